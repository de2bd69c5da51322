"""Base class of all preference scorers."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_align.user_errors import UserValueError


class Scorer(nn.Module, ABC):
    """Rates images under their prompts: greater is better, on a scale of its own.

    Weights load in float32 on the CPU; `prepare` moves and casts them.
    """

    version: ClassVar[int]  # increase with every change of preprocessing or formula: stored scores become stale

    @abstractmethod
    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Score images (3, height, width) uint8 of any sizes: (batch,)."""

    @torch.no_grad()
    def score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Score images: (batch,) float32 on the CPU, computed without autocast.

        Args:
            images: (3, height, width) uint8 each, of any sizes and on any device, or one batched tensor.
            prompts: one per image.

        Raises:
            ValueError: if a score is not finite.
        """
        assert len(images) == len(prompts), f"{len(images)} images, {len(prompts)} prompts"
        with torch.autocast(self.device.type, enabled=False):
            scores = self._score([image.cpu() for image in images], prompts).float().cpu()
        if not scores.isfinite().all():
            culprit = prompts[int((~scores.isfinite()).nonzero()[0])]
            raise UserValueError(f"{type(self).__name__} returned a score that is not finite for prompt {culprit!r}.")
        return scores

    @property
    def device(self) -> torch.device:
        """Device of the weights; the CPU for a scorer without weights."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights; float32 for a scorer without weights."""
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    def prepare(self, device: torch.device | str) -> "Scorer":
        """Move to `device` in eval mode: fp16 on CUDA, float32 elsewhere.

        fp16 has three more bits of mantissa than bf16, which would round cosines to steps of 0.002.
        """
        device = torch.device(device)
        return self.eval().to(device, torch.float16 if device.type == "cuda" else torch.float32)

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide scores beside the weights, such as the image size; plain values."""
        return {}

    def fingerprint(self) -> str:
        """Digest class, version, settings and weights to 16 hexadecimal digits. Call before `prepare` casts weights."""
        digest = hashlib.sha256(f"{type(self).__name__}/{self.version}/{sorted(self.settings().items())}".encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name}/{tuple(value.shape)}".encode())
            digest.update(value.detach().float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest a transformers tokenizer's vocabulary and rules to 16 hexadecimal digits; calls do not change it."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("truncation"), rules.pop("padding")
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]
