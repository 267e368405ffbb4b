"""What a chip costs an hour: list prices, looked up once, to be checked before anybody relies on them.

On demand, in US dollars, in Google Cloud's cheapest US regions; Google's own list is https://cloud.google.com/tpu/pricing.
Spot and flex-start prices are about half of these or less, commitments are cheaper too, some regions are dearer; hosts,
disks and traffic are not included. `--price_per_chip_hour` replaces them.
"""

DATE = "2026-11-24"  # when these were looked up

# v6e and v5p are in SkyPilot's catalog of Google's list (github.com/skypilot-org/skypilot-catalog, catalogs/v8/gcp/vms.csv, commit
# 006059e): tpu-v6e-64 in us-east5 at 172.80 an hour, tpu-v5p-8960, which is 4,480 chips, in us-central1 at 18,816.00. v5e is the
# figure quoted everywhere; its row of the list was not read. No price was found for tpu7x.
PER_CHIP_HOUR: dict[str, float] = {"v5e": 1.20, "v6e": 2.70, "v5p": 4.20}
