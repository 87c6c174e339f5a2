"""Learn the parity of bit strings, with rotation and without: `python scripts/learn_parity.py --help`."""

import sys

from mamba3_jepa.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", "parity", *sys.argv[1:]]))
