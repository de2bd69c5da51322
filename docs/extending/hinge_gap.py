"""An objective: learn the chosen image until it is better than the rejected one by a gap."""

import torch

from lit_align.objectives.base import Objective
from lit_align.types import ObjectiveOutput, PairErrors, PairFacts


class HingeGap(Objective):
    """Fine-tuning on the chosen image, plus a hinge on the difference of errors.

    Args:
        gap: difference of errors (rejected minus chosen) at which the hinge ends.
        hinge_weight: weight of the hinge.
    """

    needs_reference = False

    def __init__(self, gap: float = 0.02, hinge_weight: float = 1.0) -> None:
        self.gap, self.hinge_weight = gap, hinge_weight

    def __call__(
        self, policy: PairErrors, reference: PairErrors | None, facts: PairFacts | None = None
    ) -> ObjectiveOutput:
        margin = policy.rejected - policy.chosen  # (batch,)
        hinge = self.hinge_weight * torch.relu(self.gap - margin)
        return ObjectiveOutput(policy.chosen + hinge, margin.detach(), {"loss/hinge": hinge.detach()})

    def formula(self) -> str:
        return f"HingeGap: mean(L_w + {self.hinge_weight:g} relu({self.gap:g} - (L_l - L_w)))"
