"""Files that are either complete or absent, also after a crash."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image


@contextmanager
def atomic_path(path: Path, one_writer: bool = False) -> Iterator[Path]:
    """Yield a temporary path; fsync and rename it to `path` on success, delete it on error.

    The temporary file is in the folder of `path`: between file systems a move is a copy, which can be cut short.

    Args:
        path: file to write; missing folders are made.
        one_writer: only one process writes `path` at a time. The temporary name is fixed then, so that the leftovers of
            a killed process are overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part" if one_writer else f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_if_absent(path: Path, data: bytes) -> None:
    """Write a file atomically unless it exists: the first of several writers wins."""
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.whole")
    with atomic_path(own) as part:
        part.write_bytes(data)
    try:
        path.hardlink_to(own)
    except FileExistsError:
        pass
    except OSError:  # a disk without hard links: the last writer wins
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG file atomically."""
    with atomic_path(path) as part:
        image.save(part, "PNG")
