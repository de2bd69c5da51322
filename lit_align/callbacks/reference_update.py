"""A reference that follows the policy on a schedule (BalancedDPO; TR-DPO, arXiv 2404.09656)."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lit_align.backbones.reference import Reference
from lit_align.training.module import AlignmentModule
from lit_align.training.steps import at_logged_step, at_step
from lit_align.user_errors import UserValueError


class ReferenceUpdate(L.Callback):
    """Moves the reference every N optimizer steps: reference <- alpha policy + (1 - alpha) reference.

    It acts after the step and before checkpoints are written, on all ranks, whose weights are equal. From the first
    update on the checkpoint holds the reference's weights. Override `should_update` for another schedule.

    Args:
        every_n_steps: optimizer steps between updates.
        alpha: 1 copies the policy; a smaller value moves the reference by that share, in full fine-tuning only.
        start_step: no update before this optimizer step.
    """

    def __init__(self, every_n_steps: int, alpha: float = 1.0, start_step: int = 0) -> None:
        if every_n_steps < 1:
            raise UserValueError(f"ReferenceUpdate.every_n_steps is {every_n_steps}; it must be at least 1.")
        if not 0 < alpha <= 1:
            raise UserValueError(f"ReferenceUpdate.alpha is {alpha}; it must be greater than 0 and at most 1.")
        if start_step < 0:
            raise UserValueError(f"ReferenceUpdate.start_step is {start_step}; it must be at least 0.")
        self.every_n_steps, self.alpha, self.start_step = every_n_steps, alpha, start_step
        self.updates = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._reference(pl_module).check_alpha(self.alpha)
        if self.alpha < 1 and trainer.precision in ("bf16-true", "16-true"):
            raise UserValueError(
                f"ReferenceUpdate.alpha is {self.alpha}, but trainer.precision is {trainer.precision}, in which the "
                "reference's small moves would round to nothing. Set alpha to 1, or trainer.precision to bf16-mixed."
            )

    def should_update(self, step: int) -> bool:
        """Whether to move the reference after this optimizer step; called once per step, equally on all ranks."""
        return step >= self.start_step and step % self.every_n_steps == 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        reference = self._reference(pl_module)
        if at_logged_step(trainer):
            pl_module.log("reference/distance", reference.distance(), batch_size=1)
            pl_module.log("reference/updates", float(self.updates), batch_size=1)
        if at_step(trainer) and self.should_update(trainer.global_step):
            distance = reference.distance()
            reference.update(self.alpha)
            self.updates += 1
            moved = "copied from" if self.alpha == 1 else f"moved by {self.alpha:g} towards"
            rank_zero_info(f"step {trainer.global_step:,}: reference {moved} the policy, which was {distance:.4g} away")

    def __str__(self) -> str:
        share = "copied" if self.alpha == 1 else f"moved by {self.alpha:g}"
        begin = f" from step {self.start_step}" if self.start_step else ""
        return f"{share} every {self.every_n_steps} steps{begin}"

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]

    def _reference(self, pl_module: L.LightningModule) -> Reference:
        assert isinstance(pl_module, AlignmentModule)
        if pl_module.objective.needs_reference and pl_module.backbone.reference is None:
            raise UserValueError(
                "ReferenceUpdate has nothing to move: model.reference_errors replaces the reference by errors that "
                "were computed before the run. Take the callback out, or set model.reference_errors to null."
            )
        if pl_module.backbone.reference is None:
            raise UserValueError(
                f"ReferenceUpdate has nothing to move: {pl_module.objective.name()} has no reference model. "
                "Take the callback out, or choose an objective that has one (BalancedDPO, DiffusionDPO)."
            )
        return pl_module.backbone.reference
