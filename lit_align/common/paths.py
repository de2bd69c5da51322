"""Paths as people type them, and as they can be typed again."""

import os
import shlex
from pathlib import Path


def expand_home(path: str) -> str:
    """Replace a leading `~` by the home folder, unless the working directory holds a file or folder of that name."""
    first = path.split("/")[0]
    return os.path.expanduser(path) if first.startswith("~") and not Path(first).exists() else path


def as_argument(path: str | Path) -> str:
    """Quote a path for a command line; `./` in front keeps YAML from reading its first character as syntax."""
    text = str(path)
    return shlex.quote(text if text[:1].isalnum() or text[:1] in "./_" else f"./{text}")
