"""Direct preference optimization on denoising errors: Diffusion-DPO (arXiv 2311.12908) and BalancedDPO.

`L_w` and `L_l` are the policy's errors on the chosen and the rejected image, `R_w` and `R_l` the reference's errors
with equal noise and timesteps. `gain = -0.5 ((L_w - L_l) - (R_w - R_l))` is positive where the policy has moved towards
the chosen image; the losses are functions of `inside = beta_dpo * gain`.

Conventions of beta differ. As in the code of Diffusion-DPO's authors (whose launchers set 5000), errors are means over
an image's elements and the factor 0.5 is kept; the paper sums errors and has no 0.5.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align.objectives.base import Objective, in_double, positive
from lit_align.types import ObjectiveOutput, PairErrors
from lit_align.user_errors import UserValueError

LossType = Literal["sigmoid", "hinge", "ipo"]


class DiffusionDPO(Objective):
    """Diffusion-DPO (Wallace et al. 2023) and two variants of its loss.

        sigmoid   -(1 - e) logsigmoid(inside) - e logsigmoid(-inside), e = label_smoothing (cDPO, Mitchell 2023)
        hinge     relu(1 - inside) (SLiC, arXiv 2305.10425)
        ipo       (gain - 1 / (2 beta_dpo))^2 (IPO, arXiv 2310.12036); its gradient shrinks with 1 / beta_dpo and is
                  too small for AdamW's eps at 5000: start near 10

    Args:
        beta_dpo: strength of the tie to the reference; greater values keep the policy closer to it.
        loss_type: `sigmoid`, `hinge` or `ipo`.
        label_smoothing: assumed share of wrong labels, only for `sigmoid`.
    """

    needs_reference: ClassVar[bool] = True

    def __init__(self, beta_dpo: float = 5000.0, loss_type: LossType = "sigmoid", label_smoothing: float = 0.0) -> None:
        self.beta_dpo = positive("beta_dpo", beta_dpo)
        if loss_type not in FORMULAS:
            raise UserValueError(f"loss_type is {loss_type!r}; it must be one of {', '.join(FORMULAS)}.")
        if not 0 <= label_smoothing < 0.5:
            raise UserValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and less than 0.5.")
        if label_smoothing and loss_type != "sigmoid":
            raise UserValueError(f"label_smoothing is {label_smoothing}, which loss_type {loss_type!r} does not have.")
        self.loss_type, self.label_smoothing = loss_type, float(label_smoothing)

    def __call__(self, policy: PairErrors, reference: PairErrors | None) -> ObjectiveOutput:
        assert reference is not None, "needs_reference"
        chosen, rejected = in_double(policy)
        reference_chosen, reference_rejected = in_double(reference)
        chosen_drift, rejected_drift = chosen - reference_chosen, rejected - reference_rejected
        gain = -0.5 * (chosen_drift - rejected_drift)
        terms = {
            "chosen_drift": chosen_drift,
            "rejected_drift": rejected_drift,
            "chosen_worse": (chosen_drift > 0).to(gain.dtype),
        }
        dtype = policy.chosen.dtype
        return ObjectiveOutput(
            losses=self._losses(gain),
            margin=(self.beta_dpo * gain).detach().to(dtype),
            terms={name: value.detach().to(dtype) for name, value in terms.items()},
        )

    def _losses(self, gain: Tensor) -> Tensor:
        """Compute the loss of each pair, (batch,), from its gain."""
        inside = self.beta_dpo * gain
        if self.loss_type == "hinge":
            return torch.relu(1 - inside)
        if self.loss_type == "ipo":
            return (gain - 1 / (2 * self.beta_dpo)).square()
        kept = 1 - self.label_smoothing
        return -kept * F.logsigmoid(inside) - self.label_smoothing * F.logsigmoid(-inside)

    def concerns(self) -> list[str]:
        if self.loss_type == "ipo" and self.beta_dpo > 100:
            return [
                f"model.objective.beta_dpo 10: ipo's gradient shrinks with 1 / beta_dpo, and at {self.beta_dpo:g} it "
                "is too small for AdamW's eps"
            ]
        if self.loss_type != "ipo" and self.beta_dpo < 10:
            return [
                f"model.objective.beta_dpo 5000: at {self.beta_dpo:g} the loss begins to saturate where errors differ "
                f"by {2 / self.beta_dpo:.2g}, more than errors do; such a beta is for summed errors or language models"
            ]
        return []

    def formula(self) -> str:
        beta, smoothing = f"{self.beta_dpo:g}", f"{self.label_smoothing:g}"
        text = FORMULAS[self.loss_type].replace("beta", beta)
        if self.label_smoothing:
            kept = f"{1 - self.label_smoothing:g}"
            text = f"mean(-{kept} logsigmoid(inside) - {smoothing} logsigmoid(-inside))"
        return f"{type(self).__name__}: {text}, inside = -0.5 {beta} ((L_w - L_l) - (R_w - R_l))"


FORMULAS = {
    "sigmoid": "mean(-logsigmoid(inside))",
    "hinge": "mean(relu(1 - inside))",
    "ipo": "mean((inside / beta - 1 / (2 beta))^2)",
}


class BalancedDPO(DiffusionDPO):
    """Diffusion-DPO's loss on pairs ordered by the vote of several scorers (Tamboli et al., arXiv 2503.12575).

    A reconstruction: it puts the paper's ideas (consensus of votes, updates of the reference) into the loss of
    Diffusion-DPO, because the exact form of its equations is not known to us. `data.vote` orders the pairs and
    `ReferenceUpdate` moves the reference; pairs without a vote are refused.
    """

    needs_vote: ClassVar[bool] = True
