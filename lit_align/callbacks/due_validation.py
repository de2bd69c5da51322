"""A validation that a run did not come to, made up for when it goes on."""

from typing import Any

import lightning as L

from lit_align.training.steps import at_step


class DueValidation(L.Callback):
    """Validates before the first step of a run that goes on from a checkpoint which came before a due validation.

    At a step where both are due the checkpoint is the first, and what ends the run may come between them. Lightning
    takes the validation for done then: it would be missing in the log, and to all that acts on it.
    """

    def __init__(self) -> None:
        self.due = False  # when the checkpoint was written that the run goes on from
        self._trainer: L.Trainer | None = None
        self._validated = -1  # step of the last validation

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer if stage == "fit" else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.due:
            self.due = False
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False  # else it would begin behind the batches of the validation before
            trainer.validating = True
            loop.run()
            trainer.training = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"due": self._is_due()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.due = state_dict["due"]

    def _is_due(self) -> bool:
        """Whether the step that was just taken will be validated; asked while a checkpoint is written."""
        trainer = self._trainer
        if trainer is None or self._validated == trainer.global_step or not at_step(trainer):
            return False
        loop = trainer.fit_loop
        fetcher = loop._data_fetcher
        return fetcher is not None and bool(loop.epoch_loop._should_check_val_fx(fetcher))
