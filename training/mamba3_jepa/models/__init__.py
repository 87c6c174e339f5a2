"""The networks: one file per block."""
