"""Find and read files: local ones, `http(s):`, `s3:`, `gs:`, `hf:` through fsspec, and `pipe:` commands."""

import io
import os
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import IO

from lit_align.data.shards.filesystems import PIPE, filesystem_of, is_url
from lit_align.data.shards.spooled import SpooledFile, spool
from lit_align.data.shards.timeouts import TimedFile, within

PAUSES = (1.0, 5.0)  # seconds between attempts to read from the network


def size(path: str, timeout: float | None = None) -> int | None:
    """Size of a file, bytes; None for `pipe:`, whose size is unknown before it is read.

    Raises:
        OSError: if the file is missing.
    """
    return within(timeout, path, partial(_size, path))


def _size(path: str) -> int | None:
    if not is_url(path):
        return Path(path).stat().st_size
    if path.startswith(PIPE):
        return None
    filesystem, name = filesystem_of(path)
    found: int | None = filesystem.info(name)["size"]
    return found


def exists(path: str) -> bool:
    """Whether a file exists; False for `pipe:`."""
    if not is_url(path):
        return Path(path).is_file()
    if path.startswith(PIPE):
        return False
    filesystem, name = filesystem_of(path)
    return bool(filesystem.exists(name))


def read_range(path: str, offset: int, count: int, timeout: float | None = None) -> bytes:
    """Read `count` bytes from `offset` on, or fewer if the file ends before.

    Args:
        path: local path or URL.
        offset: bytes.
        count: bytes.
        timeout: seconds until a read is given up; None waits forever.

    Raises:
        OSError: if the file cannot be read; TimeoutError if that takes too long.
    """
    return within(timeout, path, partial(_read_range, path, offset, count))


def _read_range(path: str, offset: int, count: int) -> bytes:
    if not is_url(path):
        with Path(path).open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(count) or b""
    if not _has_ranges(path):
        return os.pread(spool(path).fileno(), count, offset)
    filesystem, name = filesystem_of(path)
    exactly = {} if filesystem.async_impl else {"cache_type": "none"}  # the default of some reads megabytes ahead
    read = partial(filesystem.cat_file, name, start=offset, end=offset + count, **exactly)
    for pause in PAUSES:
        try:
            data: bytes = read()
            return data
        except (FileNotFoundError, PermissionError):
            raise
        except Exception:  # filesystems raise errors of any class; the network may recover
            time.sleep(pause)
    data = read()
    return data


def open_binary(path: str, timeout: float | None = None) -> IO[bytes]:
    """Open a file for reading, seekable; its reads raise the errors of `read_range`.

    Raises:
        OSError: if it cannot be opened.
    """
    file = within(timeout, path, partial(_open, path))
    return file if timeout is None and not is_url(path) else io.BufferedReader(TimedFile(file, path, timeout), 1 << 15)


def _open(path: str) -> IO[bytes]:
    if not is_url(path):
        return Path(path).open("rb")
    if not _has_ranges(path):
        return io.BufferedReader(SpooledFile(spool(path)))
    filesystem, name = filesystem_of(path)
    file: IO[bytes] = filesystem.open(name, "rb")
    return file


@lru_cache(maxsize=4096)
def _has_ranges(url: str) -> bool:
    """Whether parts of a file can be requested; a simple web server always answers with the whole file."""
    if url.startswith(PIPE):
        return False
    if not url.startswith(("http:", "https:")):
        return True
    filesystem, name = filesystem_of(url)
    return filesystem.info(name).get("partial", True) and len(filesystem.cat_file(name, start=0, end=2)) == 2
