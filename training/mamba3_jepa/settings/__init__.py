"""Settings: what the command line offers, with the text of its help.

Nothing here imports anything heavy (no torch, no numpy), so that `--help` answers at once. The docstrings of the fields
are the help text and name flags; messages name a setting in backticks, as everywhere below `cli`, which shows it as its
flag.
"""
