"""What a training module writes into a checkpoint, and what it reads from one."""

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lit_align import __version__
from lit_align.backbones import Backbone
from lit_align.backbones.compiled import plain_name
from lit_align.internals import rewind_to_step
from lit_align.objectives import Objective
from lit_align.training.checkpoints.plain_state import make_plain
from lit_align.training.checkpoints.resume import beginning, check_beginning, check_form, check_weights
from lit_align.training.checkpoints.run_record import RunRecord
from lit_align.training.non_finite import Skipping, describe_non_finite
from lit_align.user_errors import UserRuntimeError

LOWER = "Lower the learning rate; bf16-mixed or 32-true instead of half precision helps too."


class SavedModule(L.LightningModule):
    """A module whose checkpoints hold what was trained, and that refuses those of another run."""

    backbone: Backbone
    objective: Objective
    skipping: Skipping
    run_record: RunRecord
    seed: int

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only trained weights, the reference once it has moved, and the facts that an export needs.

        Seed and the Trainer's counters are the random state of all ranks, see `training_draw`.
        """
        reference = self.backbone.reference
        kept = self._trained_names() | (self._reference_names() if reference is not None and reference.moved else set())
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["lit_align"] = {
            "version": __version__,
            "skipped": self.skipping.count,
            "fault": self.skipping.fault,
            "run": self.run_record.save(self),
            **beginning(self),
        }
        if "loops" in checkpoint and self.trainer.state.fn == TrainerFn.FITTING:
            accumulate = self.trainer.accumulate_grad_batches
            rewind_to_step(checkpoint["loops"], accumulate, self.trainer.num_training_batches)
        fault = self._agree(describe_non_finite(checkpoint))
        self._refuse(checkpoint, fault, "No checkpoint is written; earlier ones are as they were.")
        make_plain(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not hold exactly what this module trains.

        Raises:
            UserValueError: if weights are missing, unknown or of other shapes, or if training began with another seed
                or objective.
        """
        checkpoint["state_dict"] = {plain_name(name): value for name, value in checkpoint["state_dict"].items()}
        weights, reference = checkpoint["state_dict"], self._reference_names()
        moved = not reference.isdisjoint(weights)
        own = self.state_dict()
        check_weights(weights, {name: own[name] for name in self._trained_names() | (reference if moved else set())})
        if self.backbone.reference is not None:
            self.backbone.reference.moved = moved
        fault = describe_non_finite(checkpoint)
        if self._trainer is not None and self.trainer.strategy.restore_checkpoint_after_setup:
            fault = self._agree(fault)  # each device has read its own shard; else a device may resume from nothing
        self._refuse(checkpoint, fault, "Resume from an earlier checkpoint.")
        began = checkpoint.get("lit_align", {})
        self.skipping.count = began.get("skipped", 0)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            check_beginning(began, beginning(self), self.skipping.policy)
            check_form(began, self.objective)
            self.run_record.resume(checkpoint, self)

    def _agree(self, fault: str | None) -> str | None:
        """Return the fault of this device, or that another one has a fault; all devices must call it."""
        if self._trainer is None or self.trainer.strategy.reduce_boolean_decision(fault is None, all=True):
            return fault
        return fault or "values on another device are not finite"

    def _refuse(self, checkpoint: dict[str, Any], fault: str | None, remedy: str) -> None:
        """Raise a UserRuntimeError if there is a fault: weights or optimizer states that are not finite."""
        if fault is not None:
            raise UserRuntimeError(f"step {checkpoint['global_step']:,}: {fault}. {remedy} {LOWER}")

    def _trained_names(self) -> set[str]:
        return {f"backbone.{name}" for name in self.backbone.trainable_parameters()}

    def _reference_names(self) -> set[str]:
        return {f"backbone.{name}" for name in self.backbone.reference_weights()}
