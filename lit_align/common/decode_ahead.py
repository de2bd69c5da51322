"""Decoding in threads while the consumer computes."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def decode_ahead(
    decode: Callable[[Item], Result], items: Iterable[Item], batch_size: int, threads: int | None = None
) -> Iterator[list[Result]]:
    """Decode items in threads, one batch ahead of the consumer; yield the results batch by batch, in order."""
    left = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        ahead: list[Future[Result]] = []
        try:
            while True:
                now, ahead = ahead, [pool.submit(decode, item) for item in islice(left, batch_size)]
                if now:
                    yield [future.result() for future in now]
                if not ahead:
                    return
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error nobody waits for the rest
