"""Where bytes come from: local files, `http(s):`, `s3:`, `gs:`, `hf:` through fsspec, and `pipe:` commands."""

import glob
import os
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, TypeVar

import braceexpand
import fsspec

EXTRAS = {"s3fs": "s3", "gcsfs": "gcs"}  # packages behind fsspec that we bring as extras
Answer = TypeVar("Answer")


def is_url(path: str) -> bool:
    """Whether a path is not that of a local file."""
    return path.startswith("pipe:") or "://" in path


def join(folder: str, name: str) -> str:
    """A name in a folder, where the folder may be a URL and the name stand for itself."""
    if is_url(name) or Path(name).is_absolute():
        return name
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def parent(path: str) -> str:
    """The folder of a file, which may be a URL."""
    return path.rsplit("/", 1)[0] if is_url(path) else str(Path(path).parent)


def expand(patterns: str | Sequence[str], allow_pipe: bool = False) -> list[str]:
    """Paths from paths and URLs, braces (`{000..127}.tar`) and wildcards (`*.tar`), each pattern's matches sorted.

    Args:
        patterns: one or several; `pipe:` commands are taken as they are.
        allow_pipe: whether `pipe:` may run shell commands.

    Raises:
        FileNotFoundError: if a local path does not exist, or a pattern matches nothing.
        ValueError: for a `pipe:` that is not allowed, or a wildcard in a web address.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern.startswith("pipe:"):
            if not allow_pipe:
                raise ValueError(
                    f"{pattern!r} would run a shell command. If you trust it, turn it on with data.allow_pipe."
                )
            found += braceexpand.braceexpand(pattern)
        elif is_url(pattern) and not pattern.startswith("file:"):
            found += [path for url in braceexpand.braceexpand(pattern) for path in _match_url(url)]
        else:
            local = pattern.removeprefix("file://") if "://" in pattern else pattern.removeprefix("file:")
            found += [path for one in braceexpand.braceexpand(local) for path in _match_local(one, pattern)]
    return found


def _match_local(path: str, pattern: str) -> list[str]:
    found = sorted(glob.glob(path)) if glob.has_magic(path) else [path] * Path(path).is_file()
    if not found:
        raise FileNotFoundError(
            f"{pattern!r}: there is no file {path!r} (working directory {Path.cwd()}). "
            "Braces {000..127} and wildcards * are expanded."
        )
    return found


def _match_url(url: str) -> list[str]:
    if not glob.has_magic(url):
        return [url]
    if url.startswith(("http:", "https:")):
        raise ValueError(f"{url!r}: a web server cannot be asked for wildcards. Use braces {{000..127}}, or an index.")
    filesystem, path = _filesystem(url)
    found = [filesystem.unstrip_protocol(match) for match in sorted(filesystem.glob(path))]
    if not found:
        raise FileNotFoundError(f"{url!r} matches no file.")
    return found


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = next((name for name in EXTRAS if name in str(error)), None)
        remedy = f" Install it with: pip install 'lit-align[{EXTRAS[package]}]'" if package else ""
        raise ModuleNotFoundError(f"{url!r} cannot be read: {error}.{remedy}") from error
    return filesystem, path


def size(path: str, timeout: float | None = None) -> int | None:
    """Bytes of a file; None where only reading it would tell.

    Raises:
        OSError: if it cannot be found.
    """

    def ask() -> int | None:
        if not is_url(path):
            return Path(path).stat().st_size
        if path.startswith("pipe:"):
            return None
        filesystem, name = _filesystem(path)
        found: int | None = filesystem.info(name)["size"]
        return found

    return within(timeout, path, ask)


def exists(path: str) -> bool:
    """Whether there is such a file; never so for `pipe:`."""
    if not is_url(path):
        return Path(path).is_file()
    if path.startswith("pipe:"):
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
        spooled = _spooled(path)
        return os.pread(spooled.fileno(), count, offset)
    filesystem, name = _filesystem(path)
    data: bytes = filesystem.cat_file(name, start=offset, end=offset + count)
    return data


def open_binary(path: str) -> IO[bytes]:
    """A seekable file for reading from its start.

    Raises:
        OSError: if it cannot be opened.
    """
    if not is_url(path):
        return Path(path).open("rb")
    if not _has_ranges(path):
        return os.fdopen(os.dup(_spooled(path).fileno()), "rb")
    filesystem, name = _filesystem(path)
    file: IO[bytes] = filesystem.open(name, "rb")
    return file


@lru_cache(maxsize=4096)
def _has_ranges(url: str) -> bool:
    """Whether parts of it can be asked for; a simple web server answers with all of it."""
    if url.startswith("pipe:"):
        return False
    if not url.startswith(("http:", "https:")):
        return True
    filesystem, name = _filesystem(url)
    return filesystem.info(name).get("partial", True) and len(filesystem.cat_file(name, start=0, end=2)) == 2


@lru_cache(maxsize=4)  # shards; a forgotten one is closed and its space freed
def _spooled(url: str) -> IO[bytes]:
    """A temporary copy of what can only be read from start to end."""
    copy = tempfile.TemporaryFile(prefix="lit-align-")
    if url.startswith("pipe:"):
        command = url.removeprefix("pipe:")
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


def within(timeout: float | None, path: str, work: Callable[[], Answer]) -> Answer:
    """What `work` returns, in at most `timeout` seconds; what it raises is an OSError.

    A read that hangs in the kernel cannot be stopped: it is left behind in a thread that ends with the process.
    """
    if timeout is None:
        return _as_os_error(work)
    answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((True, _as_os_error(work)))
        except BaseException as error:
            answer.put((False, error))

    threading.Thread(target=run, daemon=True, name=f"read {path}").start()
    try:
        worked, value = answer.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError(f"no answer in {timeout:g} s") from None
    if not worked:
        raise value
    result: Answer = value
    return result


def _as_os_error(work: Callable[[], Answer]) -> Answer:
    """Filesystems behind fsspec raise errors of their own kinds."""
    try:
        return work()
    except (OSError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
