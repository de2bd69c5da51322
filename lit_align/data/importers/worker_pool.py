"""A pool of worker processes, which end when the process that started them ends."""

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

Job = TypeVar("Job")
Result = TypeVar("Result")


def worker_count(workers: int | None) -> int:
    """Return `workers`; None means one for each usable core, up to 16, as each may take a gigabyte.

    Raises:
        UserValueError: if workers is below 1.
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(16, cores)
    if workers < 1:
        raise UserValueError(f"workers is {workers}; it must be at least 1.")
    return workers


def shared(work: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """Yield the result of `work` for each job, in order of completion; a single worker runs in this process.

    Raises:
        UserRuntimeError: if a worker process was killed.
    """
    if workers == 1:
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])  # imported once, not by every worker
    left = iter(jobs)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin) as pool:
        running: set[Future[Result]] = {pool.submit(work, job) for job in islice(left, 2 * workers)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(work, job) for job in islice(left, len(done))}
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise UserRuntimeError(
                f"One of {workers} worker processes was killed, perhaps because memory ran out. "
                "The same command resumes the import; try it with fewer --workers."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Ignore interrupts, which the parent process handles, and exit when the parent exits, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True, name="ends with its parent").start()
