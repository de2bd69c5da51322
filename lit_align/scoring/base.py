"""The face of every preference scorer, and what scorers share."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_align.user_errors import UserValueError


class Scorer(nn.Module, ABC):
    """Says how good images are under their prompts; greater is better, the scale is the scorer's own.

    Weights are loaded in float32 on the CPU; `prepare` puts them where they work.
    """

    version: ClassVar[int]  # counts changes of preprocessing or formula: scores of another version are stale

    @abstractmethod
    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Scores (batch,) of images (3, height, width) uint8, of any sizes."""

    @torch.no_grad()
    def score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Scores (batch,) float32 on the CPU, outside any autocast.

        Args:
            images: (3, height, width) uint8 each, of any sizes and on any device, or one tensor of them.
            prompts: one an image.

        Raises:
            ValueError: if a score is not finite.
        """
        assert len(images) == len(prompts), f"{len(images)} images, {len(prompts)} prompts"
        with torch.autocast(self.device.type, enabled=False):
            scores = self._score([image.cpu() for image in images], prompts).float().cpu()
        if not scores.isfinite().all():
            culprit = prompts[int((~scores.isfinite()).nonzero()[0])]
            raise UserValueError(
                f"{type(self).__name__} gave a score that is not finite, first for prompt {culprit!r}."
            )
        return scores

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU where there are none."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The weights' precision."""
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    def prepare(self, device: torch.device | str) -> "Scorer":
        """Move to `device` in the precision that serves scores best there.

        fp16 on CUDA: three more bits of mantissa than bf16, which would round cosines to steps of 0.002.
        """
        device = torch.device(device)
        return self.eval().to(device, torch.float16 if device.type == "cuda" else torch.float32)

    def settings(self) -> dict[str, Any]:
        """What beside the weights decides the scores, such as image size and normalisation; plain values."""
        return {}

    def fingerprint(self) -> str:
        """16 hexadecimal digits of class, version, settings and weights; ask before `prepare` casts the weights."""
        digest = hashlib.sha256(f"{type(self).__name__}/{self.version}/{sorted(self.settings().items())}".encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name}/{tuple(value.shape)}".encode())
            digest.update(value.detach().float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def tokenizer_digest(tokenizer: Any) -> str:
    """16 hexadecimal digits of a transformers tokenizer's vocabulary and rules, without what a call changes."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("truncation"), rules.pop("padding")
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]
