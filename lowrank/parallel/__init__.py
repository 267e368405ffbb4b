"""Where it runs: the device mesh, and the one table that lays logical axes over it."""
