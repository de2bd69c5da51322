"""Training speed in pairs per second, and the share of the time that waits for data."""

import time
from typing import Any

import lightning as L

from lit_align.training.steps import at_logged_step
from lit_align.types import EncodedBatch, PreferenceBatch


class Throughput(L.Callback):
    """Logs `train/pairs_per_second` of all devices, and the share of that time in which the first device had no data.

    Validation and generating images do not count. The share, `train/data_wait`, is 0 where the workers keep up.
    """

    def __init__(self) -> None:
        self.pairs = 0
        self.seconds = self.waited = 0.0  # of the current window
        self.resumed_at: tuple[float, float] | None = None  # clock, and the loader's waiting so far

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.resumed_at is None:
            self.resumed_at = self._now(trainer)

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
        running = self.resumed_at is not None
        self.pause(trainer)
        self.resumed_at = self._now(trainer) if running else None  # waiting for the next batch counts
        seconds = max(self.seconds, 1e-9)
        pl_module.log("train/pairs_per_second", self.pairs / seconds, batch_size=1)
        pl_module.log("train/data_wait", min(self.waited / seconds, 1.0), batch_size=1)
        pl_module.log("pairs/s", self.pairs / seconds, prog_bar=True, logger=False, batch_size=1)
        self.pairs, self.seconds, self.waited = 0, 0.0, 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pause(trainer)

    def pause(self, trainer: L.Trainer) -> None:
        """Stop the clock until the next batch."""
        if self.resumed_at is not None:
            clock, waited = self._now(trainer)
            self.seconds += clock - self.resumed_at[0]
            self.waited += waited - self.resumed_at[1]
            self.resumed_at = None

    def _now(self, trainer: L.Trainer) -> tuple[float, float]:
        """The clock, and the seconds that the loader has let the training wait."""
        return time.monotonic(), getattr(trainer.train_dataloader, "waited", 0.0)
