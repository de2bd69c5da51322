"""One file per scorer, their preprocessing and their weight files."""
