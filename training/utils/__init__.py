"""Programs that are started with `python -m utils.<name>`."""
