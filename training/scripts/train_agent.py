"""Phase 3: `python scripts/train_agent.py --help`. Also runs under `accelerate launch` and `torchrun`."""

import sys

from mamba3_jepa.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train-agent", *sys.argv[1:]], prog="mamba3-jepa"))
