"""PyTorch to safetensors: `python -m utils.export_weights --help`, from this folder's parent."""

import sys

from mamba3_jepa.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]], prog="python -m utils.export_weights"))
