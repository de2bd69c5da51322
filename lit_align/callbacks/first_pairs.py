"""The pairs of the first step, before it."""

from collections.abc import Iterator
from itertools import islice

import lightning as L

from lit_align.data.loader import PairLoader
from lit_align.training.steps import accumulated
from lit_align.types import EncodedBatch, PreferenceBatch


def first_batches(trainer: L.Trainer, pairs: int) -> Iterator[PreferenceBatch | EncodedBatch]:
    """Yield at most `pairs` pairs of this rank's first step, on its device, without touching the loader's workers."""
    loader = trainer.train_dataloader
    batches = loader.first_batches(pairs) if isinstance(loader, PairLoader) else iter(loader or ())
    for batch in islice(batches, accumulated(trainer)):
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
