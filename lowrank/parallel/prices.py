"""What a chip costs an hour: list prices, looked up once, to be checked before anybody relies on them.

On demand, in US dollars, in Google Cloud's cheapest US regions; Google's own list is https://cloud.google.com/tpu/pricing.
Spot and flex-start prices are about half of these and less, commitments are cheaper too, some regions are dearer; hosts,
disks and traffic are not in them. `--price_per_chip_hour` says another.
"""

DATE = "2026-11-24"  # when these were looked up

PER_CHIP_HOUR: dict[str, float] = {
    "v5e": 1.20,  # Google's list as widely quoted; not in the catalog below in the part that was read
    "v6e": 2.70,  # SkyPilot's catalog of Google's list: tpu-v6e-64 in us-east5 at 172.80 (github.com/skypilot-org/skypilot-catalog)
    "v5p": 4.20,  # the same: tpu-v5p-8960, which is 4,480 chips, in us-central1 at 18,816.00
}
