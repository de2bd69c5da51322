"""Run functions in forked processes."""

import multiprocessing
import os
import socket
from collections.abc import Callable


def fork(function: Callable[[], None], **environment: str) -> multiprocessing.Process:
    """Start a function in a process of its own; a fork, because importing everything again takes 10 seconds."""

    def run():
        os.environ.update(environment)
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def fork_ranks(function: Callable[[], None], timeout: float = 200) -> None:
    """Run a function in two processes with the environment that torchrun gives its own.

    Args:
        function: it is to say on which rank it is.
        timeout: seconds until both must have ended without an error.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [fork(function, **torchrun, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    try:
        for process in both:
            process.join(timeout)
        assert [process.exitcode for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()  # the other one, where one failed, would wait for it
