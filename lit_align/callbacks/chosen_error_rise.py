"""How far the errors of the held-out chosen images have risen since the run began."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.types import EncodedBatch, PreferenceBatch

UNCOUNTED = -1.0  # in the place of an error: of a pair that was not seen, or counts for nothing


class ChosenErrorRise(L.Callback):
    """Measures held-out chosen errors before the first step, and at each validation how they have changed since.

    It logs `val/chosen_error_rise`, the mean over the pairs of (error - start) / start, and
    `val/chosen_worse_than_start`, the share of pairs whose error is greater than it was. Noise and timesteps of a
    held-out pair are always the same, so both tell of the weights alone; and of the run's own start, where
    `chosen_worse`, which some objectives log, compares with a reference that may have moved.

    The start is measured by Lightning's sanity check, which is made to see all held-out pairs. It leaves the training
    as it was; a resumed run has none, and takes the start from its checkpoint (4 bytes a pair).
    """

    def __init__(self) -> None:
        self.start: Tensor | None = None  # (pairs,) float32, by the pair's number
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # number, weight, error of a batch here, (batch,) each

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.num_sanity_val_steps = float("inf")  # as -1 in Trainer's constructor

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seen = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: PreferenceBatch | EncodedBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._seen.append((batch.pairs.numbers, batch.pairs.weight, outputs["chosen_error"]))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        errors = self._errors(trainer)
        if trainer.sanity_checking:
            self.start = errors if self.start is None else self.start
        elif self.start is not None and len(self.start) != len(errors):
            rank_zero_warn(
                f"ChosenErrorRise: there are {len(errors)} held-out pairs, and there were {len(self.start)} when the "
                "run began; their errors are not compared. Use the data.val_shards that the run began with."
            )
        elif self.start is not None:
            counted = (self.start >= 0) & (errors != UNCOUNTED)
            start, now = self.start[counted], errors[counted]
            pl_module.log("val/chosen_error_rise", (now / start - 1).mean())  # the same on all ranks
            pl_module.log("val/chosen_worse_than_start", (now > start).float().mean())

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        for logger in trainer.loggers:  # Lightning itself does not log a sanity check
            logger.log_metrics(values, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["start"]

    def _errors(self, trainer: L.Trainer) -> Tensor:
        """The chosen errors of this validation's pairs on all ranks, (pairs,) float32 on the CPU, by their numbers."""
        number, weight, error = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        reduce = trainer.strategy.reduce
        size = int(reduce(number.max() + 1, reduce_op="max"))
        sums = torch.zeros(2, size, device=error.device)
        counted = torch.stack([torch.where(weight > 0, error * weight, 0.0), weight])
        total = reduce(sums.index_add_(1, number, counted), reduce_op="sum").cpu()
        return torch.where(total[1] > 0, total[0] / total[1], UNCOUNTED)
