"""Where bytes lie: local disks and buckets, JSON lines, locks, and folders that appear whole or not at all."""
