"""A progress bar over the whole run: optimizer steps done, time left."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from lit_align.common.progress import Progress, show_progress
from lit_align.training.steps import total_steps


class StepProgress(ProgressBar):
    """Counts optimizer steps of the whole fit, whereas Lightning's own bars count batches of an epoch.

    Shows the last logged values. Prints a line every 30 seconds if stderr is a log file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bar: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all ranks except the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        return self._enabled

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.is_enabled:
            total, done = total_steps(trainer), trainer.global_step
            self.bar = show_progress(total, "fit", "step", done)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is not None and trainer.global_step > self.bar.n:
            self.bar.set_postfix(self.values(trainer, pl_module))
            self.bar.update(trainer.global_step - int(self.bar.n))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()  # of a run that a signal has ended, see `Preemption`

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.is_enabled and self.bar is None:
            first = trainer.sanity_checking
            counts = trainer.num_sanity_val_batches if first else trainer.num_val_batches
            self.bar = show_progress(sum(int(n) for n in counts), "first validation" if first else "validate", "batch")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.bar is not None and is_alone(trainer):
            self.bar.update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_alone(trainer):
            self._close()

    def values(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, str]:
        """Format the logged metrics with four digits."""
        metrics = self.get_metrics(trainer, pl_module)
        return {k: f"{float(v):.4g}" for k, v in metrics.items() if k != "v_num" and isinstance(v, int | float)}

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def is_alone(trainer: L.Trainer) -> bool:
    """Whether a validation runs outside `fit`, whose bar counts steps."""
    return trainer.state.fn == "validate" or trainer.sanity_checking
