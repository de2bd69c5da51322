"""Where bytes come from: local files, `http(s):`, `s3:`, `gs:`, `hf:` through fsspec, and `pipe:` commands."""

import glob
import io
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import braceexpand
import fsspec

from lit_align.data.shards.timeouts import TimedFile, within
from lit_align.user_errors import MissingPackageError, UserFileNotFoundError, UserValueError

PIPE = "pipe:"
PAUSES = (1.0, 5.0)  # seconds before the network is asked again
_trusted: set[str] = set()  # commands that the user has turned on; others come from data, and never run
EXTRAS = {"s3fs": "s3", "gcsfs": "gcs"}  # packages behind fsspec that we bring as extras


def is_url(path: str) -> bool:
    """Whether a path is not that of a local file."""
    return path.startswith(PIPE) or "://" in path


def join(folder: str, name: str) -> str:
    """A name in a folder, where the folder may be a URL and the name stand for itself."""
    if is_url(name) or Path(name).is_absolute():
        return name
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def parent(path: str) -> str:
    """The folder of a file, which may be a URL."""
    return path.rsplit("/", 1)[0] if is_url(path) else str(Path(path).parent)


def expand(patterns: str | Sequence[str], allow_pipe: bool = False, must_exist: bool = True) -> list[str]:
    """Paths from paths and URLs, braces (`{000..127}.tar`) and wildcards (`*.tar`), each pattern's matches sorted.

    Args:
        patterns: one or several; `pipe:` commands are taken as they are.
        allow_pipe: whether `pipe:` may run shell commands.
        must_exist: refuse local paths that do not; else they are found missing when they are read.

    Raises:
        FileNotFoundError: if a wildcard matches nothing, or a local path must exist and does not.
        ValueError: for a `pipe:` that is not allowed, or a wildcard in a web address.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern.startswith(PIPE):
            if not allow_pipe:
                raise UserValueError(
                    f"{pattern!r} would run a shell command. If you trust it, turn it on with data.allow_pipe."
                )
            found += [trust(command) for command in braceexpand.braceexpand(pattern)]
        elif is_url(pattern) and not pattern.startswith("file:"):
            found += [path for url in braceexpand.braceexpand(pattern) for path in _match_url(url)]
        else:
            local = pattern.removeprefix("file://") if "://" in pattern else pattern.removeprefix("file:")
            found += [path for one in braceexpand.braceexpand(local) for path in _match_local(one, pattern, must_exist)]
    return found


def trust(command: str) -> str:
    """The `pipe:` address, which may run from now on in this process."""
    _trusted.add(command)
    return command


def _match_local(path: str, pattern: str, must_exist: bool) -> list[str]:
    there = Path(path).exists() or not must_exist
    found = sorted(glob.glob(path)) if glob.has_magic(path) else [path] * there
    if not found:
        raise UserFileNotFoundError(
            f"{pattern!r}: there is no file {path!r} (working directory {Path.cwd()}). "
            "Braces {000..127} and wildcards * are expanded."
        )
    return found


def _match_url(url: str) -> list[str]:
    web = url.startswith(("http:", "https:"))  # whose `?` begins a query
    if not (("*" in url) if web else glob.has_magic(url)):
        return [url]
    if web:
        raise UserValueError(
            f"{url!r}: a web server cannot be asked for wildcards. Use braces {{000..127}}, or an index."
        )
    filesystem, path = _filesystem(url)
    found = [filesystem.unstrip_protocol(match) for match in sorted(filesystem.glob(path))]
    if not found:
        raise UserFileNotFoundError(f"{url!r} matches no file.")
    return found


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = next((name for name in EXTRAS if name in str(error)), None)
        remedy = f" Install {package}, lit-align's extra {EXTRAS[package]}." if package else ""
        raise MissingPackageError(f"{url!r} cannot be read: {error}.{remedy}") from error
    return filesystem, path


def size(path: str, timeout: float | None = None) -> int | None:
    """Bytes of a file; None where only reading it would tell.

    Raises:
        OSError: if it cannot be found.
    """

    def ask() -> int | None:
        if not is_url(path):
            return Path(path).stat().st_size
        if path.startswith(PIPE):
            return None
        filesystem, name = _filesystem(path)
        found: int | None = filesystem.info(name)["size"]
        return found

    return within(timeout, path, ask)


def exists(path: str) -> bool:
    """Whether there is such a file; never so for `pipe:`."""
    if not is_url(path):
        return Path(path).is_file()
    if path.startswith(PIPE):
        return False
    filesystem, name = _filesystem(path)
    return bool(filesystem.exists(name))


def read_range(path: str, offset: int, count: int, timeout: float | None = None) -> bytes:
    """`count` bytes from `offset` on, fewer where the file ends before.

    Args:
        path: local path or URL.
        offset: bytes.
        count: bytes.
        timeout: seconds until a read is given up; None waits forever.

    Raises:
        OSError: if they cannot be read, TimeoutError among them.
    """
    return within(timeout, path, partial(_read_range, path, offset, count))


def _read_range(path: str, offset: int, count: int) -> bytes:
    if not is_url(path):
        with Path(path).open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(count) or b""
    if not _has_ranges(path):
        return os.pread(_spooled(path).fileno(), count, offset)
    filesystem, name = _filesystem(path)
    exactly = {} if filesystem.async_impl else {"cache_type": "none"}  # else some read megabytes ahead
    for pause in PAUSES:
        try:
            data: bytes = filesystem.cat_file(name, start=offset, end=offset + count, **exactly)
            return data
        except (FileNotFoundError, PermissionError):
            raise
        except Exception:  # of whatever kind the filesystem has; the network may be back soon
            time.sleep(pause)
    data = filesystem.cat_file(name, start=offset, end=offset + count, **exactly)
    return data


def open_binary(path: str, timeout: float | None = None) -> IO[bytes]:
    """A seekable file for reading from its start; reads raise as those of `read_range` do.

    Raises:
        OSError: if it cannot be opened.
    """
    file = within(timeout, path, partial(_open, path))
    return file if timeout is None and not is_url(path) else io.BufferedReader(TimedFile(file, path, timeout), 1 << 15)


def _open(path: str) -> IO[bytes]:
    if not is_url(path):
        return Path(path).open("rb")
    if not _has_ranges(path):
        return io.BufferedReader(_Spooled(_spooled(path)))
    filesystem, name = _filesystem(path)
    file: IO[bytes] = filesystem.open(name, "rb")
    return file


class _Spooled(io.RawIOBase):
    """A place in a temporary copy that others read as well."""

    def __init__(self, copy: IO[bytes]) -> None:
        self.copy, self.place = copy, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: os.fstat(self.copy.fileno()).st_size}
        self.place = begin[whence] + offset
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self.copy.fileno(), [buffer], self.place)
        self.place += count
        return count


@lru_cache(maxsize=4096)
def _has_ranges(url: str) -> bool:
    """Whether parts of it can be asked for; a simple web server answers with all of it."""
    if url.startswith(PIPE):
        return False
    if not url.startswith(("http:", "https:")):
        return True
    filesystem, name = _filesystem(url)
    return filesystem.info(name).get("partial", True) and len(filesystem.cat_file(name, start=0, end=2)) == 2


@lru_cache(maxsize=4)  # shards; a forgotten one is closed and its space freed
def _spooled(url: str) -> IO[bytes]:
    """A temporary copy of what can only be read from start to end."""
    copy = tempfile.TemporaryFile(prefix="lit-align-")  # noqa: SIM115  # nameless: it survives no process
    if url.startswith(PIPE):
        if url not in _trusted:
            raise PermissionError(f"{url!r} would run a shell command, which only data.allow_pipe turns on")
        command = url.removeprefix(PIPE)
        with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            shutil.copyfileobj(process.stdout, copy, 1 << 20)
        if process.returncode:
            raise OSError(f"the command {command!r} ended with status {process.returncode}")
    else:
        filesystem, name = _filesystem(url)
        filesystem.get_file(name, copy)
    copy.flush()
    return copy
