"""Checkpoint files: written atomically, found, compared on resume."""
