"""Faults of a network that pass by themselves: which those are, and calls that are repeated until they have passed."""

import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from lit_align.user_errors import UserOSError

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds between attempts
LONGEST_PAUSE = 900.0  # seconds; a server that asks for more is not waited for
PASSING = (408, 409, 421, 423, 425, 429)  # HTTP statuses below 500 that pass
LASTING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError, ImportError)
OWN = (AssertionError, AttributeError, TypeError, NameError)  # faults of a program, not of a network
Answer = TypeVar("Answer")


class StillFailingError(UserOSError):
    """A read that failed at every attempt, for a reason that may pass later."""


def status_of(error: BaseException) -> int | None:
    """HTTP status behind an error of any network library; None if there is none."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # of botocore
            response = response.get("ResponseMetadata", {})
            status = response.get("HTTPStatusCode")
        else:
            status = getattr(one, "status", None) or getattr(response, "status_code", None)
        if isinstance(status, int) and 300 <= status < 600:
            return status
    return None


def is_passing(error: BaseException) -> bool:
    """Whether the same read may succeed later: not for a missing file or a refusal, nor for a fault of a program."""
    if isinstance(error, OWN):
        return False
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in PASSING
    causes = [one for one in _chain(error) if not isinstance(one, LookupError)]  # of caches
    return not causes or not isinstance(causes[-1], LASTING)  # fsspec calls any failed request a missing file


def asked_pause(error: BaseException) -> float:
    """Seconds that the server asks to wait (`Retry-After`); 0 if it does not."""
    for one in _chain(error):
        headers = getattr(one, "headers", None) or getattr(getattr(one, "response", None), "headers", None)
        asked = _header(headers, "Retry-After")
        if asked:
            try:
                return max(float(asked), 0.0)
            except ValueError:
                pass
            try:
                return max(parsedate_to_datetime(asked).timestamp() - time.time(), 0.0)
            except ValueError:
                return 0.0
    return 0.0


def call_patiently(work: Callable[[], Answer], name: str) -> Answer:
    """Call `work` again, after increasing pauses, while it fails for a reason that may pass.

    Args:
        work: reads something.
        name: of what it reads, for messages.

    Raises:
        StillFailingError: if it failed at every attempt, or the server asks for a longer pause than `LONGEST_PAUSE`.
        Exception: any error of `work` that does not pass, unchanged.
    """
    for attempt in range(len(PAUSES) + 1):
        try:
            return work()
        except StillFailingError:
            raise
        except Exception as error:
            if not is_passing(error):
                raise
            asked = asked_pause(error)
            if attempt == len(PAUSES) or asked > LONGEST_PAUSE:
                wait = f", and the server asks to wait {asked:g} s" if asked else ""
                raise StillFailingError(f"{name}: {describe(error)} at {attempt + 1} attempts{wait}") from error
            pause = max(PAUSES[attempt], asked)
            print(f"{name}: {describe(error)}. Trying again in {pause:g} s.", flush=True)
            time.sleep(pause)
    raise AssertionError("unreachable")


def describe(error: BaseException) -> str:
    """Status or class of an error, with its words."""
    status = status_of(error)
    deepest = [one for one in _chain(error) if not isinstance(one, LookupError)][-1:] or [error]
    words = " ".join(str(getattr(deepest[0], "message", "") or deepest[0]).split())[:200]
    return f"HTTP status {status} {words}".rstrip() if status else f"{type(deepest[0]).__name__}: {words}"


def _header(headers: Any, name: str) -> str:
    try:
        return str(headers.get(name) or "").strip()
    except AttributeError:
        return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, and so on."""
    one: BaseException | None = error
    for _ in range(20):
        if one is None:
            return
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
