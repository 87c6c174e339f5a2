"""Files, read and written with care: whole or not at all, with errors that name the file."""
