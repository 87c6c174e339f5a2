"""The model's parts under short names: `from models.vljepa import Mamba3Jepa`. The library is `mamba3_jepa.models`."""
