"""The DataLoader of an epoch, which begins at the batch where the Trainer is."""

import atexit
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from lit_align.data.dataset import PairDataset
from lit_align.data.order import Batch
from lit_align.internals import shut_down_workers
from lit_align.types import EncodedBatch, PreferenceBatch
from lit_align.user_errors import UserError


class BatchLoader:
    """A DataLoader of some batches, whose workers end with it and whose errors name what is broken.

    Args:
        dataset: makes the batches.
        batches: which ones, in their order.
        workers: processes that read; 0 reads in this process.
    """

    def __init__(self, dataset: PairDataset, batches: Iterable[Batch], workers: int) -> None:
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_identity,
            worker_init_fn=_outlive_signals,
        )
        self.waited = 0.0  # seconds until batches were there
        if workers:
            atexit.register(_release, weakref.ref(self))

    def __iter__(self) -> Iterator[PreferenceBatch | EncodedBatch]:
        # The body of a generator runs at the first `next`: by then the Trainer has restored its counters.
        try:
            batches = iter(self.loader)
            while (batch := self._next(batches)) is not None:
                yield batch
        except UserError as error:  # torch puts the traceback of a worker in front of the message
            raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from error

    def _next(self, batches: Iterator[Any]) -> Any:
        """Return the next batch, None at the end, and count the time until it is there."""
        began = time.monotonic()
        try:
            return next(batches, None)
        finally:
            self.waited += time.monotonic() - began

    def release(self) -> None:
        """Shut the workers down now, even if a traceback still holds their iterator.

        At exit Python would wait for them without end, since they survive the one signal that it sends.
        """
        shut_down_workers(self.loader)


class PairLoader(BatchLoader):
    """A DataLoader for every epoch; each epoch begins where the Trainer is.

    Args:
        dataset: makes the batches.
        workers: processes that read; 0 reads in this process.
        position: returns the epoch and the number of batches consumed in it; called when an epoch begins.
    """

    def __init__(self, dataset: PairDataset, workers: int, position: Callable[[], tuple[int, int]]) -> None:
        self.dataset, self.order, self.position = dataset, dataset.order, position
        super().__init__(dataset, RemainingBatches(self), workers)

    def __len__(self) -> int:
        return self.order.batches

    def first_batches(self, pairs: int) -> Iterator[PreferenceBatch | EncodedBatch]:
        """Read the first pairs of this rank in this process, beside the loader and its workers."""
        for batch in self.order.rest(0, 0):
            yield self.dataset[batch._replace(numbers=batch.numbers[:pairs])]
            pairs -= len(batch.numbers)
            if pairs <= 0:
                return

    def state_dict(self) -> dict[str, int]:
        """Return nothing: the Trainer's counters are the state. Lightning resumes mid-epoch if the method exists."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore nothing, see `state_dict`."""


class RemainingBatches:
    """Sampler of the batches that an epoch has left on this rank.

    Args:
        loader: knows the order and the position.
    """

    def __init__(self, loader: PairLoader) -> None:
        self.order, self.position = loader.order, loader.position

    def __iter__(self) -> Iterator[Batch]:
        epoch, consumed = self.position()
        return self.order.rest(epoch, consumed)

    def __len__(self) -> int:
        return self.order.batches


def _identity(batch: Any) -> Any:
    return batch


def _release(loader: "weakref.ref[BatchLoader]") -> None:
    """Shut the workers down at exit, before multiprocessing joins them."""
    alive = loader()
    if alive is not None:
        alive.release()


def _outlive_signals(worker: int) -> None:
    """Let a worker survive SIGUSR1 and the first SIGTERM, which SLURM sends to all processes of a run, and Ctrl-C.

    A run whose worker died could not finish its step. The second SIGTERM ends the worker.
    """
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
