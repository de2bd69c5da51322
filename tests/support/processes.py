"""Run functions in forked processes."""

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch


def fork(function: Callable[[], None], **environment: str) -> multiprocessing.Process:
    """Start a function in a forked process, which need not import anything again (10 seconds)."""

    def run():
        os.environ.update(environment)
        # After a fork torch makes its pool of threads anew; two threads that ask for it first may meet none.
        torch.set_num_threads(1)
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def fork_ranks(function: Callable[[], None], timeout: float = 200) -> None:
    """Run a function in two forked processes with the environment variables that torchrun sets.

    Args:
        function: runs on both ranks; reads RANK from the environment where they differ.
        timeout: seconds within which both must end without an error.
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
            process.kill()  # if one has failed, the other waits for it
