"""Settings: what the command line offers, with the text of its help.

Nothing here imports anything heavy (no torch, no numpy), so that `--help` answers at once. Flags are named in this
folder and in `cli` only; elsewhere messages name a setting in backticks, and the command line shows it as its flag.
"""
