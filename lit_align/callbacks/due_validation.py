"""After a resume, the validation that was scheduled at the checkpoint's step but had not run."""

from typing import Any

import lightning as L

from lit_align.internals import is_validation_due, run_validation
from lit_align.training.steps import at_step


class DueValidation(L.Callback):
    """After a resume, runs the validation that was scheduled at the checkpoint's step but had not run.

    At a step with both, the checkpoint is written first, and the run may end before the validation. Lightning then
    counts the validation as done: logs and callbacks that act on validations would miss it.
    """

    def __init__(self) -> None:
        self.due = False  # at the checkpoint from which this run resumes
        self._trainer: L.Trainer | None = None
        self._validated = -1  # step of the last validation

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer if stage == "fit" else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.due:
            self.due = False
            run_validation(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"due": self._is_due()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.due = state_dict["due"]

    def _is_due(self) -> bool:
        """Whether a validation follows the last step; called while a checkpoint is written."""
        trainer = self._trainer
        if trainer is None or self._validated == trainer.global_step or not at_step(trainer):
            return False
        return is_validation_due(trainer)
