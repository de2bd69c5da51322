"""Errors of a reference that never moves, computed before a run for the noise that each pair will have in each epoch.

FOLDER/reference_errors.json              what they were computed with
FOLDER/epoch-00000/part-00000.safetensors errors of some batches of the training pairs, by the pairs' numbers
FOLDER/held-out/part-00000.safetensors    errors of held-out pairs

`lit-align reference-errors` writes such a folder.
"""

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_align.backbones import Backbone
from lit_align.backbones.encoder_parts import DIFFUSERS_STEM
from lit_align.backbones.loading.model_files import digest_weights
from lit_align.common.files import atomic_path
from lit_align.common.manifest import differences, in_words, read_manifest
from lit_align.common.paths import expand_home
from lit_align.diffusion.draws import Draw
from lit_align.objectives import Objective
from lit_align.training.precisions import compute_dtype, full_spelling
from lit_align.training.reference_source import VALIDATION, LiveReference, NoReference
from lit_align.training.steps import total_epochs
from lit_align.types import EncodedBatch, PairErrors, PreferenceBatch
from lit_align.user_errors import UserFileNotFoundError, UserValueError

FINGERPRINT = "reference_errors.json"
FORMAT = 1  # to be raised with every change of `draw_by_pair` or of the checksums
ABSENT = torch.iinfo(torch.int64).min  # checksum of a pair that has no errors
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
AGAIN = "Compute them with the config of this run: lit-align reference-errors --config ... --output ..."


def part_file(epoch: int | None, part: int) -> str:
    """Return the name of a file in the folder; `VALIDATION` stands for the held-out pairs."""
    return f"{'held-out' if epoch is VALIDATION else f'epoch-{epoch:05d}'}/part-{part:05d}.safetensors"


class Part(NamedTuple):
    """Errors of some pairs."""

    numbers: Tensor  # (pairs,) int64, of the pairs in their data set
    checksums: Tensor  # (pairs, 2) int64, of what was seen of them; `ABSENT` for an unreadable pair
    errors: Tensor  # (pairs, draws, 2) float32, the chosen image first

    def save(self, path: Path) -> None:
        """Write the part, atomically."""
        with atomic_path(path, one_writer=True) as file:
            save_file(self._asdict(), file)


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
        "weights in": _weights_in(backbone, spelling),
        "prediction type": backbone.schedule.prediction_type,
        "precision": spelling,
        **{name: getattr(module, name) for name in ("seed", "caption_dropout", "validation_draws")},
    }


class ReferenceErrors(NoReference):
    """Reads errors that were computed before the run, and notices pairs that they were not computed for.

    Args:
        folder: see the top of this file.
    """

    draws_by_pair = True

    def __init__(self, folder: str) -> None:
        self.folder: Path = Path(expand_home(folder))
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
        if changed := differences(self.made()["model"], identity(module, module.trainer.precision)):
            raise UserValueError(
                f"model.reference_errors: {self.folder} does not fit this run: {in_words(changed)}. {AGAIN}"
            )
        self._accepted = True

    def check_length(self, trainer: L.Trainer) -> None:
        """Refuse errors of fewer epochs than the run takes.

        Raises:
            UserValueError: naming both numbers.
        """
        made, epochs = self.made(), total_epochs(trainer)
        have = next(epoch for epoch in count() if not self._whole(made, epoch))
        if epochs is None or have < epochs:
            run = "has no end" if epochs is None else f"takes {epochs}"
            raise UserValueError(
                f"model.reference_errors: {self.folder} holds {have} whole epochs, and the run {run}. Set "
                "trainer.max_epochs or trainer.max_steps, or add epochs: run lit-align reference-errors again with "
                "more --epochs."
            )

    def check_folder(self) -> None:
        self.made()

    def made(self) -> dict[str, Any]:
        """Read what the errors were computed with.

        Raises:
            UserFileNotFoundError: if there are none.
        """
        path = self.folder / FINGERPRINT
        if not path.is_file():
            raise UserFileNotFoundError(f"model.reference_errors: {self.folder} has no {FINGERPRINT}. {AGAIN}")
        return read_manifest(path)

    def _whole(self, made: Mapping[str, Any], epoch: int | None) -> bool:
        return all((self.folder / part_file(epoch, part)).is_file() for part in range(_parts(made, epoch)))

    def errors(
        self, batch: PreferenceBatch | EncodedBatch, encoded: EncodedBatch, draw: Draw, epoch: int | None,
        repeat: int = 0,
    ) -> PairErrors:  # fmt: skip
        """Look up the errors; it waits for no device."""
        table, numbers = self._table(epoch), batch.pairs.numbers
        rows = torch.tensor(numbers).clamp(max=len(table.checksums) - 1)
        device, columns = batch.pairs.weight.device, (table.checksums, table.errors[:, repeat])
        known, errors = (column[rows].to(device, non_blocking=True) for column in columns)
        foreign = (known != batch.checksums()).any(1) & (batch.pairs.weight > 0)
        self._foreign.append((numbers, epoch, foreign))
        chosen, rejected = errors.unbind(1)
        return PairErrors(chosen, rejected)

    def refuse_foreign(self) -> None:
        """Refuse the pairs since the last call for which the errors were not computed. It waits for the device.

        Raises:
            UserValueError: naming the first.
        """
        seen, self._foreign = self._foreign, []
        for numbers, epoch, foreign in seen:
            if foreign.any():
                number = numbers[foreign.tolist().index(True)]
                where = "the held-out pairs" if epoch is VALIDATION else f"epoch {epoch}"
                raise UserValueError(
                    f"model.reference_errors: {self.folder} was not computed for pair {number} of {where} as this run "
                    "sees it: with these images, crop, flip, prompt, label and use of a cache, or it could not be read "
                    f"then. {AGAIN}"
                )

    def _table(self, epoch: int | None) -> Part:
        if epoch not in self._tables:
            self._tables = {kept: table for kept, table in self._tables.items() if kept is VALIDATION}
            self._tables[epoch] = self._load(epoch)
        return self._tables[epoch]

    def _load(self, epoch: int | None) -> Part:
        made = self.made()
        if not self._whole(made, epoch):
            which = "all held-out pairs" if epoch is VALIDATION else f"the whole epoch {epoch}"
            raise UserFileNotFoundError(
                f"model.reference_errors: {self.folder} does not hold {which}. Run lit-align reference-errors again "
                "with the same options, and enough --epochs."
            )
        parts = [_read(self.folder / part_file(epoch, part)) for part in range(_parts(made, epoch))]
        numbers, checksums, errors = (torch.cat(columns) for columns in zip(*parts, strict=True))
        table = Part(
            torch.arange(int(numbers.max()) + 1),
            torch.full((int(numbers.max()) + 1, 2), ABSENT),
            torch.zeros(int(numbers.max()) + 1, *errors.shape[1:]),
        )
        table.checksums[numbers], table.errors[numbers] = checksums, errors
        return table


def _weights_in(backbone: Backbone, precision: str) -> str:
    """Name the precision of the reference's weights: with a LoRA that of a frozen base, otherwise float32."""
    if backbone.lora is None:
        return str(torch.float32)
    return backbone.lora.base if backbone.lora.base != "compute" else str(compute_dtype(precision))


def _parts(made: Mapping[str, Any], epoch: int | None) -> int:
    parts: int = made["parts"]["held out" if epoch is VALIDATION else "train"]
    return parts


def _read(path: Path) -> Part:
    with safe_open(path, framework="pt") as file:
        return Part(*(file.get_tensor(name) for name in Part._fields))


def reference_source(objective: Objective, backbone: Backbone, folder: str | None) -> NoReference:
    """Choose where an objective's reference errors come from; `folder` holds errors computed before the run.

    Raises:
        UserValueError: if there is a folder, but no need of it.
    """
    if objective.needs_reference:
        return LiveReference(backbone) if folder is None else ReferenceErrors(folder)
    if folder is not None:
        raise UserValueError(
            f"model.reference_errors is {folder}, but {type(objective).__name__} has no reference. Leave it out."
        )
    return NoReference()
