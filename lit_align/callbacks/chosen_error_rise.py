"""The rise of the errors of held-out chosen images since the start of the run."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_align.types import EncodedBatch, PreferenceBatch

UNCOUNTED = -1.0  # instead of the error of a pair that was not seen or has no weight


class ChosenErrorRise(L.Callback):
    """Measures held-out chosen errors before the first step, and their change at each validation.

    Logs `val/chosen_error_rise`, the mean over the pairs of (error - start) / start, and
    `val/chosen_worse_than_start`, the share of pairs with a greater error than at the start. A held-out pair keeps its
    noise and timesteps, so that both depend only on the weights. They compare with the run's own start, whereas
    `chosen_worse`, which some objectives log, compares with a reference that may have moved.

    Lightning's sanity check measures the start, without effect on the training: all held-out pairs where
    `trainer.num_sanity_val_steps` is -1, those of the first batches where it is a number, and none where it is 0. Pairs
    without a start are not compared. A resumed run reads the start from its checkpoint (4 bytes a pair).
    """

    def __init__(self) -> None:
        self.start: Tensor | None = None  # (pairs,) float32, by the pair's number
        self.partial = False  # whether the start covers the first batches alone
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # number, weight, error of a batch here, (batch,) each

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.start is None and trainer.enable_validation and trainer.val_dataloaders:
            why = "trainer.num_sanity_val_steps is 0" if trainer.global_step == 0 else "the run began without a start"
            rank_zero_info(f"ChosenErrorRise: {why}, so that val/chosen_error_rise is not measured.")
        elif self.start is not None and self.partial:
            pairs = int((self.start != UNCOUNTED).sum())
            rank_zero_info(
                f"ChosenErrorRise: val/chosen_error_rise compares the first {pairs:,} held-out pairs, because "
                "trainer.num_sanity_val_steps limits the start to them; -1 measures all."
            )

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
        weight = batch.pairs.weight
        numbers = torch.tensor(batch.pairs.numbers).to(weight.device, non_blocking=True)
        self._seen.append((numbers, weight, outputs["chosen_error"]))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        errors = self._errors(trainer)
        if trainer.sanity_checking:
            if self.start is None:
                self.start, self.partial = errors, trainer.num_sanity_val_steps != float("inf")
        elif self.start is not None and len(self.start) != len(errors) and not self.partial:
            rank_zero_warn(
                f"ChosenErrorRise: there are {len(errors)} held-out pairs, and there were {len(self.start)} when the "
                "run began; their errors are not compared. Use the data.val_shards that the run began with."
            )
        elif self.start is not None:
            rise, share = compare_errors(self.start, errors)
            pl_module.log("val/chosen_error_rise", rise)  # equal on all ranks
            pl_module.log("val/chosen_worse_than_start", share)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        for logger in trainer.loggers:  # Lightning does not log a sanity check
            logger.log_metrics(values, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "partial": self.partial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start, self.partial = state_dict["start"], state_dict.get("partial", False)

    def _errors(self, trainer: L.Trainer) -> Tensor:
        """The chosen errors of this validation's pairs on all ranks, (pairs,) float32 on the CPU, by their numbers."""
        number, weight, error = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        reduce = trainer.strategy.reduce
        size = int(reduce(number.max() + 1, reduce_op="max"))
        sums = torch.zeros(2, size, device=error.device)
        counted = torch.stack([torch.where(weight > 0, error * weight, 0.0), weight]).float()
        total = reduce(sums.index_add_(1, number, counted), reduce_op="sum").cpu()
        return torch.where(total[1] > 0, total[0] / total[1], UNCOUNTED)


def compare_errors(start: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """Compare the errors (pairs,) of the pairs that have both: mean of their relative rises, share of greater ones."""
    pairs = min(len(start), len(now))
    start, now = start[:pairs], now[:pairs]
    counted = (start >= 0) & (now != UNCOUNTED)
    start, now = start[counted], now[counted]
    return (now / start - 1).mean(), (now > start).float().mean()
