"""Supervised fine-tuning on the chosen images: the baseline."""

from lit_align.objectives.base import Objective
from lit_align.types import ObjectiveOutput, PairErrors, PairFacts


class SFT(Objective):
    """Supervised fine-tuning on the denoising error of the chosen image; the rejected one is only measured.

        margin = L_l - L_w
        loss   = L_w

    SFT models no preference; its margin is the logit of a preference that grows with the difference of errors.
    """

    needs_reference = False
    compares = False

    def __call__(
        self, policy: PairErrors, reference: PairErrors | None, facts: PairFacts | None = None
    ) -> ObjectiveOutput:
        margin = (policy.rejected - policy.chosen).detach()
        return ObjectiveOutput(policy.chosen, margin, {"loss/sft": policy.chosen.detach()})

    def formula(self) -> str:
        return "SFT: mean(L_w)"
