"""The rise of the errors of held-out chosen images since the start of the run."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.internals import check_all_before_training
from lit_align.types import EncodedBatch, PreferenceBatch

UNCOUNTED = -1.0  # instead of the error of a pair that was not seen or has no weight


class ChosenErrorRise(L.Callback):
    """Measures held-out chosen errors before the first step, and their change at each validation.

    Logs `val/chosen_error_rise`, the mean over the pairs of (error - start) / start, and
    `val/chosen_worse_than_start`, the share of pairs with a greater error than at the start. A held-out pair keeps its
    noise and timesteps, so that both depend only on the weights. They compare with the run's own start, whereas
    `chosen_worse`, which some objectives log, compares with a reference that may have moved.

    Lightning's sanity check, extended to all held-out pairs, measures the start, without effect on the training. A
    resumed run has no sanity check, and reads the start from its checkpoint (4 bytes a pair).
    """

    def __init__(self) -> None:
        self.start: Tensor | None = None  # (pairs,) float32, by the pair's number
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # number, weight, error of a batch here, (batch,) each

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_all_before_training(trainer)

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
            pl_module.log("val/chosen_error_rise", (now / start - 1).mean())  # equal on all ranks
            pl_module.log("val/chosen_worse_than_start", (now > start).float().mean())

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        for logger in trainer.loggers:  # Lightning does not log a sanity check
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
