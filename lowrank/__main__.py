"""`python -m lowrank` is the console script `lowrank`."""

import sys

from lowrank.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
