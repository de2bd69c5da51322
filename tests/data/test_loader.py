"""The end of a loader's workers."""

import gc
import time

import pytest

from lit_align.data import PreferenceDataModule
from tests.support.paths import PAIRS


@pytest.mark.parametrize("last", ["loader", "module"])
def test_workers_end_with_a_loader_that_nobody_released(last):
    """They waited for a message that garbage collection had cut off: 20 s, and lived on."""
    module = PreferenceDataModule(f"{PAIRS}/train/00000.tar", resolution=32, batch_size=8, num_workers=2)
    module.setup("fit")
    loader = module.train_dataloader()
    next(iter(loader))
    workers = loader.loader._iterator._workers
    assert all(worker.is_alive() for worker in workers)
    began = time.monotonic()
    if last == "loader":
        del module, loader
    else:
        del loader, module
    gc.collect()
    assert not any(worker.is_alive() for worker in workers)
    assert time.monotonic() - began < 3
