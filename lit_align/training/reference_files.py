"""Files of reference errors, which `lit-align reference-errors` writes.

FOLDER/reference_errors.json              what they were computed with
FOLDER/epoch-00000/part-00000.safetensors errors of some batches of the training pairs, by the pairs' numbers
FOLDER/held-out/part-00000.safetensors    errors of held-out pairs
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_align.common.files import atomic_path
from lit_align.common.manifest import read_manifest
from lit_align.training.reference_source import VALIDATION
from lit_align.user_errors import UserFileNotFoundError, UserValueError

FINGERPRINT = "reference_errors.json"
FORMAT = 1  # to be raised with every change of `draw_by_pair` or of the checksums
ABSENT = torch.iinfo(torch.int64).min  # checksum of a pair that has no errors
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


class ReferenceFiles:
    """Reads a folder of reference errors.

    Args:
        folder: see the top of this file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def made(self) -> dict[str, Any]:
        """Read what the errors were computed with.

        Raises:
            UserFileNotFoundError: if there are none.
        """
        path = self.folder / FINGERPRINT
        if not path.is_file():
            raise UserFileNotFoundError(f"model.reference_errors: {self.folder} has no {FINGERPRINT}. {AGAIN}")
        return read_manifest(path)

    def parts(self, epoch: int | None) -> int:
        """Number of files of an epoch, or of the held-out pairs; 0 if there are none."""
        return int(self.made()["parts"].get("val" if epoch is VALIDATION else "train", 0))

    def whole(self, epoch: int | None) -> bool:
        """Whether all files of an epoch, or of the held-out pairs, are there."""
        parts = self.parts(epoch)
        return parts > 0 and all((self.folder / part_file(epoch, part)).is_file() for part in range(parts))

    def load(self, epoch: int | None) -> Part:
        """Read the errors of an epoch, or of the held-out pairs, in the order of the pairs' numbers, without gaps.

        Raises:
            UserFileNotFoundError: if files are missing.
            UserValueError: if one cannot be read.
        """
        if not self.whole(epoch):
            which = "all held-out pairs" if epoch is VALIDATION else f"the whole epoch {epoch}"
            raise UserFileNotFoundError(
                f"model.reference_errors: {self.folder} does not hold {which}. Run lit-align reference-errors again "
                "with the same options, and enough --epochs."
            )
        parts = [_read(self.folder / part_file(epoch, part)) for part in range(self.parts(epoch))]
        numbers, checksums, errors = (torch.cat(columns) for columns in zip(*parts, strict=True))
        table = Part(
            torch.arange(int(numbers.max()) + 1),
            torch.full((int(numbers.max()) + 1, 2), ABSENT),
            torch.zeros(int(numbers.max()) + 1, *errors.shape[1:]),
        )
        table.checksums[numbers], table.errors[numbers] = checksums, errors
        return table


def _read(path: Path) -> Part:
    try:
        with safe_open(path, framework="pt") as file:
            return Part(*(file.get_tensor(name) for name in Part._fields))
    except (SafetensorError, OSError) as error:
        raise UserValueError(
            f"model.reference_errors: {path} cannot be read: {error}. Delete it, and run lit-align reference-errors "
            "again."
        ) from error
