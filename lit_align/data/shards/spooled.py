"""Local copies of shards that can only be read from start to end: `pipe:` commands, web servers without ranges.

A process and its workers share a folder of copies. It is bounded in bytes: the copies that were not used for longest
go first. As neighbouring pairs of an epoch's order come from few shards, each shard is fetched about once an epoch.
"""

import atexit
import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

from lit_align.common.lock import folder_turn
from lit_align.common.passing_faults import StillFailingError
from lit_align.data.shards.filesystems import PIPE, filesystem_of

WHOLE = (PIPE, "http:", "https:")  # fronts of addresses that may only be readable as a whole
LIMIT = 16_000_000_000  # bytes of all copies of a process and its workers; at most half of what its disk has free
FOLDER = "LIT_ALIGN_SHARD_COPIES"  # variable that names the folder to workers
PREFIX, HELD = "lit-align-copies-", "held"  # of the folders' names; the file that the owner of a folder locks

_making = threading.Lock()  # several threads scan shards
_trusted: set[str] = set()  # commands that the user has allowed; commands named by data never run


def trust(command: str) -> str:
    """Allow a `pipe:` address to run in this process, and return it."""
    _trusted.add(command)
    return command


def share_copies() -> Path:
    """Make the folder of copies, which this process deletes at its end; workers that it starts use it too."""
    with _making:
        known = Path(os.environ.get(FOLDER, ""))
        return known if known.name and known.is_dir() else _make_folder()


def _make_folder() -> Path:
    for left_over in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        _delete_unheld(left_over)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    fcntl.flock(os.open(folder / HELD, os.O_RDWR | os.O_CREAT), fcntl.LOCK_SH)  # ends with the process
    os.environ[FOLDER] = str(folder)
    atexit.register(_delete_own, folder, os.getpid())
    return folder


def _delete_unheld(folder: Path) -> None:
    """Delete a folder of copies whose process was killed."""
    with suppress(OSError):  # it is held, of another user, or just being made or deleted
        handle = os.open(folder / HELD, os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(handle)


def _delete_own(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def spool(url: str) -> IO[bytes]:
    """Open the copy of a file, and fetch it before if no process of this folder has.

    Raises:
        OSError: if the command fails or is not trusted, or the file cannot be read.
        StillFailingError: if the disk of the copies is full.
    """
    folder = share_copies()
    copy = folder / hashlib.sha256(url.encode()).hexdigest()[:24]
    with suppress(FileNotFoundError):
        return _open(copy)
    with folder_turn(folder, copy.name):  # others wait for this copy
        with suppress(FileNotFoundError):
            return _open(copy)
        try:
            _fetch(url, copy)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _make_room(copy, limit=0)
            _fetch_or_explain(url, copy)
        file = _open(copy)
    _make_room(copy, min(LIMIT, shutil.disk_usage(folder).free // 2))
    return file


def _open(copy: Path) -> IO[bytes]:
    file = copy.open("rb")
    with suppress(FileNotFoundError):  # deleted meanwhile; what is open can still be read
        os.utime(copy)
    return file


def _fetch(url: str, copy: Path) -> None:
    part = copy.with_suffix(".part")
    try:
        with part.open("wb") as file:
            if url.startswith(PIPE):
                _run(url, file)
            else:
                filesystem, name = filesystem_of(url)
                filesystem.get_file(name, file)
        part.replace(copy)
    finally:
        part.unlink(missing_ok=True)


def _fetch_or_explain(url: str, copy: Path) -> None:
    try:
        _fetch(url, copy)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StillFailingError(
            f"{copy.parent} has no space for a copy of {url}, which can only be read as a whole. Set TMPDIR to a "
            "larger disk, or copy the shards to one."
        ) from error


def _make_room(newest: Path, limit: int) -> None:
    """Delete the copies that were not used for longest, until all have at most `limit` bytes; not the newest."""
    with folder_turn(newest.parent, "room"):
        copies = [(found.st_mtime_ns, found.st_size, path) for path, found in _copies(newest.parent)]
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total > limit and path != newest:
                path.unlink(missing_ok=True)
                total -= size


def _copies(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.iterdir():
        if not path.suffix and path.name != HELD and not path.name.startswith("."):
            with suppress(FileNotFoundError):
                found.append((path, path.stat()))
    return found


def _run(url: str, copy: IO[bytes]) -> None:
    if url not in _trusted:
        raise PermissionError(f"{url!r} would run a shell command, which only data.allow_pipe turns on")
    command = url.removeprefix(PIPE)
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        shutil.copyfileobj(process.stdout, copy, 1 << 20)
    if process.returncode:
        raise OSError(f"the command {command!r} ended with status {process.returncode}")
