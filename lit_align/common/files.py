"""Files that are either whole or not there."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Another name to write a file under; it gets its own once it is on the disk, or is removed if something is raised.

    Both names are in one folder: between file systems a move is a copy, which can be cut short.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")  # several machines may write to one disk
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_if_absent(path: Path, data: bytes) -> None:
    """Write a file that is either whole or not there, unless there is one: of several writers the first one wins."""
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.whole")
    with atomic_path(own) as part:
        part.write_bytes(data)
    try:
        path.hardlink_to(own)
    except FileExistsError:
        pass
    except OSError:  # a disk without hard links
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file that is either whole or not there."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_png(path: Path, image: Image.Image) -> None:
    """Write a picture that is either whole or not there."""
    with atomic_path(path) as part:
        image.save(part, "PNG")
