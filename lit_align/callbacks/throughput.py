"""Training speed in pairs per second."""

import time
from typing import Any

import lightning as L

from lit_align.training.steps import at_logged_step
from lit_align.types import EncodedBatch, PreferenceBatch


class Throughput(L.Callback):
    """Logs `train/pairs_per_second` of all devices, without the time of validation and of generating images."""

    def __init__(self) -> None:
        self.pairs = 0
        self.seconds = 0.0
        self.resumed_at: float | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.resumed_at is None:
            self.resumed_at = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: PreferenceBatch | EncodedBatch,
        batch_idx: int,
    ) -> None:
        self.pairs += batch.pairs.size * trainer.world_size
        if not at_logged_step(trainer):
            return
        self.pause()
        speed = self.pairs / max(self.seconds, 1e-9)
        pl_module.log("train/pairs_per_second", speed, batch_size=1)
        pl_module.log("pairs/s", speed, prog_bar=True, logger=False, batch_size=1)
        self.pairs, self.seconds = 0, 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pause()

    def pause(self) -> None:
        """Stop the clock until the next batch. Waiting for data between two batches counts as training."""
        if self.resumed_at is not None:
            self.seconds += time.monotonic() - self.resumed_at
            self.resumed_at = None
