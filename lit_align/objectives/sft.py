"""Supervised fine-tuning on the chosen images: the baseline."""

from typing import ClassVar

from torch import Tensor

from lit_align.objectives.base import Objective, weighted_mean
from lit_align.types import ObjectiveOutput, PairErrors


class SFT(Objective):
    """The denoising error of the chosen images alone; the rejected ones are only measured."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, policy: PairErrors, reference: PairErrors | None, weight: Tensor) -> ObjectiveOutput:
        margin = (policy.rejected - policy.chosen).detach()
        return ObjectiveOutput(weighted_mean(policy.chosen, weight), margin, {"loss/sft": policy.chosen.detach()})

    def formula(self) -> str:
        return "SFT: mean(L_w)"
