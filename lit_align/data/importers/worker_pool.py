"""Work shared among processes, which end with the one that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from lit_align.user_errors import UserRuntimeError, UserValueError

Task = TypeVar("Task")
Result = TypeVar("Result")


def worker_count(workers: int | None) -> int:
    """As many as asked for, or one for each core that this process may use, up to 16: each may take a gigabyte.

    Raises:
        ValueError: for none at all.
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(16, cores)
    if workers < 1:
        raise UserValueError(f"workers is {workers}; it must be at least 1.")
    return workers


def shared(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """What `work` returns for each task, in the order in which it is done; one worker is this process itself.

    Raises:
        RuntimeError: if a process was killed.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])  # imported once, not by every worker
    left = iter(tasks)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin) as pool:
        running: set[Future[Result]] = {pool.submit(work, task) for task in islice(left, 2 * workers)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(work, task) for task in islice(left, len(done))}
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise UserRuntimeError(
                f"One of {workers} worker processes was killed, perhaps because memory ran out. "
                "The same command goes on where it stopped; try it with fewer --workers."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Leave interrupts to the first process, and end when it ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True, name="ends with its parent").start()
