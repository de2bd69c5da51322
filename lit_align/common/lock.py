"""Locks on folders. A lock ends with the process that holds it, however that process ends."""

import fcntl
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_align.user_errors import UserRuntimeError

log = logging.getLogger(__name__)

EXCLUSIVE_NOW = fcntl.LOCK_EX | fcntl.LOCK_NB
TAKEN = (BlockingIOError, PermissionError)  # some network file systems answer EACCES


@contextmanager
def locked_folder(folder: Path, command: str, run: str | None = None) -> Iterator[None]:
    """Keep a folder for one run of a command, and refuse a second run.

    A disk that knows no locks only gets a warning. Whether a network disk keeps out other machines is up to its file
    system; NFS 4 does.

    Args:
        folder: made if it is missing.
        command: name of the subcommand; other commands are not kept out.
        run: processes that name one run share the folder, see `ProcessGroup.run`; none: this process alone.

    Raises:
        UserRuntimeError: if another run of the command works in the folder.
    """
    run = run or uuid.uuid4().hex

    def share(handle: int) -> None:
        with suppress(*TAKEN):  # by other processes of this run, or by another run
            fcntl.flock(handle, EXCLUSIVE_NOW)
            os.ftruncate(handle, 0)
            os.pwrite(handle, run.encode(), 0)
        fcntl.flock(handle, fcntl.LOCK_SH)  # waits only while another process writes the name of its run

    with _held(folder, command, share) as handle:
        if handle is not None and os.pread(handle, 1000, 0) != run.encode():
            raise UserRuntimeError(
                f"output: another lit-align {command} writes to {folder}. Wait until it has ended, or choose another "
                "folder."
            )
        yield


@contextmanager
def folder_turn(folder: Path, command: str) -> Iterator[None]:
    """Wait until no other process has its turn in a folder, for work of a moment.

    A disk that knows no locks only gets a warning.

    Args:
        folder: made if it is missing.
        command: name of the subcommand; other commands are not waited for.
    """
    with _held(folder, command, lambda handle: fcntl.flock(handle, fcntl.LOCK_EX)):
        yield


@contextmanager
def _held(folder: Path, command: str, lock: Callable[[int], None]) -> Iterator[int | None]:
    """Lock a file in the folder (network disks lock no folders), and delete it when its last holder ends."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{command}.lock"
    handle = _open_locked(path, lock)
    try:
        yield handle
    finally:
        if handle is not None:
            with suppress(*TAKEN):
                fcntl.flock(handle, EXCLUSIVE_NOW)
                path.unlink(missing_ok=True)
            os.close(handle)


def _open_locked(path: Path, lock: Callable[[int], None]) -> int | None:
    """Open and lock a file; None where the disk knows no locks."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(handle)
        except OSError as error:
            os.close(handle)
            path.unlink(missing_ok=True)
            log.warning("%s cannot be locked (%s). Start no second command on it.", path.parent, error)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)  # another process has deleted the file meanwhile
