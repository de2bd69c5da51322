"""Reads with a timeout."""

import io
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import IO, Any, TypeVar

from lit_align.common.passing_faults import StillFailingError

Answer = TypeVar("Answer")
_abandoned: list[IO[bytes]] = []


class NoAnswerError(StillFailingError, TimeoutError):
    """A read that took longer than the user allows; it is not tried again."""


def within(timeout: float | None, path: str, work: Callable[[], Answer]) -> Answer:
    """Return the result of `work` within `timeout` seconds; None waits forever. Errors become OSErrors.

    A read that hangs in the kernel cannot be stopped; its daemon thread is abandoned and ends with the process.

    Raises:
        OSError: if `work` fails; TimeoutError if it takes longer.
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
        raise NoAnswerError(f"no answer in {timeout:g} s") from None
    if not worked:
        raise value
    result: Answer = value
    return result


def _as_os_error(work: Callable[[], Answer]) -> Answer:
    """Convert errors of fsspec's filesystems, which can be of any class."""
    try:
        return work()
    except (OSError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class SeekableReader(io.RawIOBase):
    """Base of files for reading; subclasses implement `seek` and `readinto`."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class TimedFile(SeekableReader):
    """A file for reading, whose reads have a timeout and raise only OSErrors.

    Args:
        file: reads at its position, and stays there if that fails.
        path: of the file.
        timeout: seconds until a read is given up; None waits forever.
        ask: calls a read, and again after a passing fault, see `storage.ask`.
    """

    def __init__(self, file: IO[bytes], path: str, timeout: float | None, ask: Callable[..., Any]) -> None:
        self.file, self.path, self.timeout, self.ask, self.hangs = file, path, timeout, ask, False

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.ask(self.path, partial(self.file.read, len(buffer)), self.timeout)
        except TimeoutError:
            self.hangs = True
            raise
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if self.hangs:
            _abandoned.append(self.file)  # closing or deleting it would wait for the read
        else:
            self.file.close()
        super().close()
