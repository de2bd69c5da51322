"""Find and read files: local ones, `http(s):`, `s3:`, `gs:`, `hf:` through fsspec, and `pipe:` commands.

Every call to a network is repeated while it fails for a reason that may pass. Only what a server calls missing is.
"""

import io
import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, TypeVar

from fsspec.asyn import sync

from lit_align.common.passing_faults import StillFailingError, call_patiently, describe, status_of
from lit_align.data.shards.filesystems import PIPE, filesystem_of, is_url
from lit_align.data.shards.spooled import spool
from lit_align.data.shards.timeouts import TimedFile, within

Answer = TypeVar("Answer")
GONE = (404, 410)  # HTTP statuses of a file that is not there


def ask(path: str, work: Callable[[], Answer], timeout: float | None = None) -> Answer:
    """Return the result of `work`, which reads `path`; on a network, try again after passing faults.

    Args:
        path: local path, URL or `pipe:` command; a command is run once.
        work: reads it.
        timeout: seconds until an attempt is given up; None waits forever.

    Raises:
        OSError: if it fails; FileNotFoundError only if the file is missing, whatever its filesystem calls a refusal.
    """
    attempt = partial(within, timeout, path, work)
    if not is_url(path) or path.startswith(PIPE):
        return attempt()
    try:
        return call_patiently(attempt, path)
    except StillFailingError:
        raise
    except OSError as error:
        status = status_of(error)
        if status is None or (status in GONE) == isinstance(error, FileNotFoundError):
            raise
        raise (FileNotFoundError if status in GONE else OSError)(f"{path}: {describe(error)}") from error


def size(path: str, timeout: float | None = None) -> int | None:
    """Size of a file, bytes; None for `pipe:`, whose size is unknown before it is read.

    Raises:
        OSError: if the file is missing.
    """
    return ask(path, partial(_size, path), timeout)


def _size(path: str) -> int | None:
    if not is_url(path):
        return Path(path).stat().st_size
    if path.startswith(PIPE):
        return None
    filesystem, name = filesystem_of(path)
    found: int | None = filesystem.info(name)["size"]
    return found


def exists(path: str) -> bool:
    """Whether a file exists; False for `pipe:`.

    Raises:
        OSError: if its server neither has it nor says that it is missing.
    """
    if not is_url(path):
        return Path(path).is_file()
    if path.startswith(PIPE):
        return False
    filesystem, name = filesystem_of(path)
    try:
        ask(path, partial(filesystem.info, name))  # the `exists` of web servers takes any error for an absence
    except FileNotFoundError:
        return False
    return True


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
    return ask(path, partial(_read_range, path, offset, count), timeout)


def _read_range(path: str, offset: int, count: int) -> bytes:
    if not is_url(path):
        with Path(path).open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(count) or b""
    if not _has_ranges(path):
        with spool(path) as copy:
            return os.pread(copy.fileno(), count, offset)
    filesystem, name = filesystem_of(path)
    exactly = {} if filesystem.async_impl else {"cache_type": "none"}  # the default of some reads megabytes ahead
    data: bytes = filesystem.cat_file(name, start=offset, end=offset + count, **exactly)
    return data


def open_binary(path: str, timeout: float | None = None) -> IO[bytes]:
    """Open a file for reading, seekable; its reads raise the errors of `read_range`.

    Raises:
        OSError: if it cannot be opened.
    """
    file = ask(path, partial(_open, path), timeout)
    return (
        file
        if timeout is None and not is_url(path)
        else io.BufferedReader(TimedFile(file, path, timeout, ask), 1 << 15)
    )


def _open(path: str) -> IO[bytes]:
    if not is_url(path):
        return Path(path).open("rb")
    if not _has_ranges(path):
        return spool(path)
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
    answers: bool = sync(filesystem.loop, _answers_parts, filesystem, name)
    return answers


async def _answers_parts(filesystem: Any, url: str) -> bool:
    """Ask a web server for two bytes; if it sends the whole file, close the connection instead of reading it."""
    session = await filesystem.set_session()
    options = {**filesystem.kwargs, "headers": {**filesystem.kwargs.get("headers", {}), "Range": "bytes=0-1"}}
    async with session.get(filesystem.encode_url(url), **options) as response:
        response.raise_for_status()
        return bool(response.status == 206)
