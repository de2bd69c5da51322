"""Errors of a static reference, computed before a run for the noise that each pair will have in each epoch."""

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_align.backbones import Backbone
from lit_align.backbones.encoder_parts import DIFFUSERS_STEM
from lit_align.backbones.loading.model_files import digest_weights
from lit_align.backbones.reference import force_contiguous_proj_in
from lit_align.common.manifest import differences, in_words
from lit_align.common.paths import expand_home
from lit_align.diffusion.draws import Draw
from lit_align.objectives import Objective
from lit_align.training.precisions import compute_dtype, full_spelling
from lit_align.training.reference_files import AGAIN, FORMAT, Part, ReferenceFiles
from lit_align.training.reference_source import VALIDATION, LiveReference, NoReference
from lit_align.training.steps import total_epochs
from lit_align.training.strategies import FSDP2
from lit_align.types import EncodedBatch, PairErrors, PreferenceBatch
from lit_align.user_errors import UserValueError

NUMBERS = ("seed", "caption_dropout", "validation_draws", "float32_matmul", "attention")  # of the module
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


def identity(module: Any, precision: object) -> dict[str, Any]:
    """Describe all that decides the errors beside the pairs. It reads all weight files.

    Args:
        module: an `AlignmentModule`.
        precision: of the Trainer.

    Raises:
        UserValueError: if the precision is not one of `PRECISIONS`.
    """
    backbone: Backbone = module.backbone
    if (spelling := full_spelling(precision)) not in PRECISIONS:
        raise UserValueError(
            f"trainer.precision is {precision}, in which reference errors are not computed before a run. Choose one of "
            f"{', '.join(PRECISIONS)}, or leave model.reference_errors out."
        )
    return {
        "format": FORMAT,
        **backbone.encoders_identity(),
        "denoiser": digest_weights(backbone.denoiser_location, DIFFUSERS_STEM),
        "weights in": _weights_in(module, spelling),
        "prediction type": backbone.schedule.prediction_type,
        "precision": spelling,
        **{name: getattr(module, name) for name in NUMBERS},
    }


class ReferenceErrors(NoReference):
    """Reads errors that were computed before the run, and notices pairs that they were not computed for.

    Args:
        folder: see `reference_files`.
    """

    draws_by_pair = True

    def __init__(self, folder: str) -> None:
        self.folder: Path = Path(expand_home(folder))
        self.files = ReferenceFiles(self.folder)
        self._accepted = False
        self._tables: dict[int | None, Part] = {}  # of the last epoch and of the held-out pairs, by number of the pair
        self._foreign: list[tuple[list[int], int | None, Tensor]] = []

    def __str__(self) -> str:
        return f"errors computed before, {self.folder}; static"

    def check_model(self, module: Any) -> None:
        """Refuse errors of another model, precision, seed or share of dropped prompts.

        Raises:
            UserFileNotFoundError: if there are none.
            UserValueError: naming what differs.
        """
        if self._accepted:
            return  # digesting weights takes a while
        changed = differences(self.files.made()["model"], identity(module, module.trainer.precision))
        fault = f"{self.folder} does not fit this run: {in_words(changed)}. {AGAIN}" if changed else None
        _refuse(fault, module.trainer)
        self._accepted = True

    def check_length(self, trainer: L.Trainer) -> None:
        """Refuse errors of fewer epochs than the run takes, or none of held-out pairs where it validates.

        Raises:
            UserValueError: naming what is missing.
        """
        epochs = total_epochs(trainer)
        have = next(epoch for epoch in count() if not self.files.whole(epoch))
        fault = None
        if trainer.enable_validation and not self.files.whole(VALIDATION):
            fault = f"{self.folder} does not hold all held-out pairs. {AGAIN}"
        if epochs is None or have < epochs:
            run = "has no end" if epochs is None else f"takes {epochs}"
            fault = (
                f"{self.folder} holds {have} whole epochs, and the run {run}. Set trainer.max_epochs or "
                "trainer.max_steps, or add epochs: run lit-align reference-errors again with more --epochs."
            )
        if trainer.overfit_batches:  # type: ignore[attr-defined]  # set in Trainer's constructor
            fault = "trainer.overfit_batches repeats the pairs of epoch 0, whose noise would differ. Leave one out."
        _refuse(fault, trainer)

    def check_pairs(self, trainer: L.Trainer, pairs: Mapping[str, Any]) -> None:
        """Refuse errors of pairs that are others by their labels, seed or shards, before one of them comes up."""
        made = self.files.made()["pairs"]
        both = pairs.keys() & made.keys()  # a run may have no use for held-out pairs
        changed = differences({name: made[name] for name in both}, {name: pairs[name] for name in both})
        _refuse(f"{self.folder} is of other pairs: {in_words(changed)}. {AGAIN}" if changed else None, trainer)

    def check_folder(self) -> None:
        self.files.made()

    def errors(
        self, batch: PreferenceBatch | EncodedBatch, encoded: EncodedBatch, draw: Draw, epoch: int | None,
        repeat: int = 0,
    ) -> PairErrors:  # fmt: skip
        """Look up the errors; it waits for no device."""
        table, numbers = self._table(epoch), batch.pairs.numbers
        rows = torch.tensor(numbers).clamp(max=len(table.checksums) - 1)
        device, columns = batch.pairs.weight.device, (table.checksums, table.errors[:, repeat])
        known, errors = (column[rows].to(device, non_blocking=True) for column in columns)
        if repeat == 0:  # further draws are for the pairs of the first
            foreign = (known != batch.checksums()).any(1) & (batch.pairs.weight > 0)
            self._foreign.append((numbers, epoch, foreign))
        chosen, rejected = errors.unbind(1)
        return PairErrors(chosen, rejected)

    def refuse_foreign(self, trainer: L.Trainer | None = None) -> None:
        """Refuse the pairs since the last call for which the errors were not computed. It waits for the device.

        Args:
            trainer: of all devices, if they all are to refuse together, as they must before a collective.

        Raises:
            UserValueError: naming the first.
        """
        (seen, self._foreign), fault = (self._foreign, []), None
        for numbers, epoch, foreign in seen:
            if fault is None and foreign.any():
                number = numbers[foreign.tolist().index(True)]
                where = "the held-out pairs" if epoch is VALIDATION else f"epoch {epoch}"
                fault = (
                    f"{self.folder} was not computed for pair {number} of {where} as this run sees it: with these "
                    "images, decoded by these versions, crop, flip, prompt, label and use of a cache; or it could not "
                    f"be read then. {AGAIN}"
                )
        if trainer is not None:
            _refuse(fault, trainer)
        elif fault is not None:
            raise UserValueError(f"model.reference_errors: {fault}")

    def _table(self, epoch: int | None) -> Part:
        if epoch not in self._tables:
            self._tables = {kept: table for kept, table in self._tables.items() if kept is VALIDATION}
            self._tables[epoch] = self.files.load(epoch)
        return self._tables[epoch]


def _weights_in(module: Any, precision: str) -> str:
    """Name the precision of the reference's weights: with a LoRA that of a frozen base, otherwise float32.

    FSDP2 gathers weights in half precision, those of norms too, and so rounds otherwise than autocast.
    """
    lora, half = module.backbone.lora, compute_dtype(precision)
    gathered = module._trainer is not None and isinstance(module.trainer.strategy, FSDP2)
    if lora is None:
        return f"{half}, gathered" if gathered and half != torch.float32 else str(torch.float32)
    return str(lora.base if lora.base != "compute" else half)


def _refuse(fault: str | None, trainer: L.Trainer) -> None:
    """Raise a UserValueError on all devices if one of them has found a fault; all must call it."""
    if trainer.strategy.reduce_boolean_decision(fault is None, all=True):
        return
    raise UserValueError(f"model.reference_errors: {fault or 'another device has refused it; see what it says.'}")


def reference_source(objective: Objective, backbone: Backbone, folder: str | None) -> NoReference:
    """Choose where an objective's reference errors come from; `folder` holds errors computed before the run.

    Raises:
        UserValueError: if there is a folder, but no need of it.
    """
    if objective.needs_reference:
        if folder is None:
            return LiveReference(backbone)
        force_contiguous_proj_in(backbone.denoiser)  # as a live reference does: the policy then rounds alike
        return ReferenceErrors(folder)
    if folder is not None:
        raise UserValueError(
            f"model.reference_errors is {folder}, but {objective.name()} has no reference. Leave it out."
        )
    return NoReference()
