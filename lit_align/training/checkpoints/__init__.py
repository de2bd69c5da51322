"""Checkpoint files: written atomically, found again, compared on resume."""
