"""A scorer: the mean brightness of an image. It needs no weights and ignores the prompt."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_align.scoring import Scorer


class Brightness(Scorer):
    """Mean brightness from 0 to 1.

    Args:
        gamma: exponent applied to each channel.
    """

    version: ClassVar[int] = 1  # raise it when the formula changes: stored scores are then stale

    def __init__(self, gamma: float = 1.0) -> None:
        super().__init__()
        self.gamma = gamma

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return torch.stack([(image / 255).pow(self.gamma).mean() for image in images])

    def settings(self) -> dict[str, Any]:
        return {"gamma": self.gamma}  # part of the fingerprint
