"""Where the errors of the reference come from in a step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning as L

from lit_align.backbones import Backbone
from lit_align.diffusion.draws import Draw
from lit_align.types import EncodedBatch, PairErrors, PreferenceBatch

VALIDATION = None  # in place of an epoch's number


class NoReference:
    """The objective needs none."""

    folder: Path | None = None  # of errors that were computed before the run
    draws_by_pair: ClassVar[bool] = False  # whether each pair's draw comes from its number, see `draw_by_pair`

    def errors(
        self, batch: PreferenceBatch | EncodedBatch, encoded: EncodedBatch, draw: Draw, epoch: int | None,
        repeat: int = 0,
    ) -> PairErrors | None:  # fmt: skip
        """Return the reference's errors of a batch, without gradients.

        Args:
            batch: as the data module made it, on the device of the run.
            encoded: the batch, some prompts of which are dropped.
            draw: for its pairs.
            epoch: of the training, or `VALIDATION`.
            repeat: number of a held-out pair's draw.
        """
        return None

    def check_folder(self) -> None:
        """Refuse a folder that holds no errors."""

    def check_model(self, module: Any) -> None:
        """Refuse errors that were computed otherwise than the module would, which belongs to a Trainer."""

    def check_pairs(self, trainer: L.Trainer, pairs: Mapping[str, Any]) -> None:
        """Refuse errors of other pairs.

        Args:
            trainer: of the run.
            pairs: what decides them, by split, see `data.pair_identity`.
        """

    def check_length(self, trainer: L.Trainer) -> None:
        """Refuse errors of fewer epochs than the run takes."""

    def refuse_foreign(self, trainer: L.Trainer | None = None) -> None:
        """Refuse pairs since the last call whose errors are not known, on all devices of `trainer` together."""

    def __str__(self) -> str:
        return "none"


class LiveReference(NoReference):
    """The reference that the backbone holds, which computes its errors in each step.

    Args:
        backbone: gets the reference.
    """

    def __init__(self, backbone: Backbone) -> None:
        backbone.add_reference()
        self.backbone = backbone

    def errors(
        self, batch: PreferenceBatch | EncodedBatch, encoded: EncodedBatch, draw: Draw, epoch: int | None,
        repeat: int = 0,
    ) -> PairErrors:  # fmt: skip
        return self.backbone.reference_pair_errors(encoded, draw)
