"""Temporary local copies of files that can only be read from start to end: `pipe:` commands, simple web servers."""

import io
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from typing import IO, Any

from lit_align.data.shards.filesystems import PIPE, filesystem_of
from lit_align.data.shards.timeouts import SeekableReader

_trusted: set[str] = set()  # commands that the user has allowed; commands named by data never run


def trust(command: str) -> str:
    """Allow a `pipe:` address to run in this process, and return it."""
    _trusted.add(command)
    return command


@lru_cache(maxsize=4)  # shards; a copy that drops out of the cache is closed, which frees its disk space
def spool(url: str) -> IO[bytes]:
    """Copy a file into a nameless temporary file, which ends with the process.

    Raises:
        OSError: if the command fails or is not trusted, or the file cannot be read.
    """
    copy = tempfile.TemporaryFile(prefix="lit-align-")  # noqa: SIM115  # closed when it drops out of the cache
    if url.startswith(PIPE):
        _run(url, copy)
    else:
        filesystem, name = filesystem_of(url)
        filesystem.get_file(name, copy)
    copy.flush()
    return copy


def _run(url: str, copy: IO[bytes]) -> None:
    if url not in _trusted:
        raise PermissionError(f"{url!r} would run a shell command, which only data.allow_pipe turns on")
    command = url.removeprefix(PIPE)
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        shutil.copyfileobj(process.stdout, copy, 1 << 20)
    if process.returncode:
        raise OSError(f"the command {command!r} ended with status {process.returncode}")


class SpooledFile(SeekableReader):
    """A reader of a temporary copy, with its own position: several readers share one copy."""

    def __init__(self, copy: IO[bytes]) -> None:
        self.copy, self.position = copy, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: os.fstat(self.copy.fileno()).st_size}
        self.position = start[whence] + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self.copy.fileno(), [buffer], self.position)
        self.position += count
        return count
