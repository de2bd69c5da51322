"""Direct preference optimization on denoising errors: Diffusion-DPO (arXiv 2311.12908) and BalancedDPO.

`L_w` and `L_l` are the policy's errors on the chosen and the rejected image, `R_w` and `R_l` the reference's errors
with equal noise and timesteps. `gain = -0.5 ((L_w - L_l) - (R_w - R_l))` is positive where the policy has moved towards
the chosen image; the losses are functions of `inside = beta_dpo * gain`.

Conventions of beta differ. As in the code of Diffusion-DPO's authors (whose launchers set 5000), errors are means over
an image's elements and the factor 0.5 is kept; the paper sums errors and has no 0.5.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_align.objectives.base import Objective, at_least_0, given, in_double, positive
from lit_align.objectives.dpo_losses import FORMULAS, LOSSES, LossType, soft_sigmoid
from lit_align.types import ObjectiveOutput, PairErrors, PairFacts
from lit_align.user_errors import UserValueError

CERTAIN = 0.98  # most that a vote is believed


class DiffusionDPO(Objective):
    """Diffusion-DPO (Wallace et al. 2023), variants of its loss, and a share of the chosen image's own error.

        sigmoid   -(1 - e) logsigmoid(inside) - e logsigmoid(-inside), e = label_smoothing (cDPO, Mitchell 2023)
        hinge     relu(1 - inside) (SLiC, arXiv 2305.10425)
        ipo       (inside - 1/2)^2 (IPO, arXiv 2310.12036); it has no bound, so begin near beta 500 at a low rate
        dmpo      KL(Bernoulli(sigmoid(inside)) || Bernoulli(0.99)), the reverse of sigmoid's (DMPO); it gives up
                  pairs that are far on the wrong side
        linear    slope -clamp(0.5 - 0.4 inside, 0.001, 0.999) (Linear-DPO), for a reference that follows the policy:
                  use ReferenceUpdate with every_n_steps 1

    Args:
        beta_dpo: strength of the tie to the reference; greater values keep the policy closer to it.
        loss_type: `sigmoid`, `hinge`, `ipo`, `dmpo` or `linear`.
        label_smoothing: assumed share of wrong labels, only for `sigmoid`.
        sft_mix: weight of L_w, which is added to the loss and keeps the picture where pairs are already decided.
    """

    needs_reference = True
    form = 2  # ipo was 1 / beta^2 times this one in form 1

    def __init__(
        self,
        beta_dpo: float = 5000.0,
        loss_type: LossType = "sigmoid",
        label_smoothing: float = 0.0,
        sft_mix: float = 0.0,
    ) -> None:
        self.beta_dpo, self.sft_mix = positive("beta_dpo", beta_dpo), at_least_0("sft_mix", sft_mix)
        if loss_type not in LOSSES:
            raise UserValueError(f"loss_type is {loss_type!r}; it must be one of {', '.join(LOSSES)}.")
        if not 0 <= label_smoothing < 0.5:
            raise UserValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and less than 0.5.")
        if label_smoothing and loss_type != "sigmoid":
            raise UserValueError(f"label_smoothing is {label_smoothing}, which loss_type {loss_type!r} does not have.")
        self.loss_type, self.label_smoothing = loss_type, float(label_smoothing)

    def __call__(
        self, policy: PairErrors, reference: PairErrors | None, facts: PairFacts | None = None
    ) -> ObjectiveOutput:
        assert reference is not None, "needs_reference"
        chosen, rejected = in_double(policy)
        reference_chosen, reference_rejected = in_double(reference)
        chosen_drift, rejected_drift = chosen - reference_chosen, rejected - reference_rejected
        inside = -0.5 * self.beta_dpo * (chosen_drift - rejected_drift)
        terms = {
            "chosen_drift": chosen_drift,
            "rejected_drift": rejected_drift,
            "chosen_worse": (chosen_drift > 0).to(inside.dtype),
        }
        dtype = policy.chosen.dtype
        return ObjectiveOutput(
            losses=self._losses(inside, facts) + self.sft_mix * chosen,
            margin=inside.detach().to(dtype),
            terms={name: value.detach().to(dtype) for name, value in terms.items()},
        )

    def _losses(self, inside: Tensor, facts: PairFacts | None) -> Tensor:
        """Compute the loss of each pair, (batch,), from its logit."""
        if self.label_smoothing:
            return soft_sigmoid(inside, torch.full_like(inside, 1 - self.label_smoothing))
        return LOSSES[self.loss_type](inside)

    def changed_since(self, form: int, settings: Mapping[str, Any]) -> str | None:
        was_ipo = any(name.endswith("loss_type") and value == "ipo" for name, value in settings.items())
        return "its ipo was 1 / beta_dpo^2 times today's" if form < 2 and was_ipo else None

    def concerns(self) -> list[str]:
        if self.loss_type == "ipo" and self.beta_dpo > 1000:
            return [
                f"model.objective.beta_dpo 500: ipo is a parabola, whose gradient has no bound; {self.beta_dpo:g} is "
                "for sigmoid"
            ]
        if self.beta_dpo < 10:
            return [
                f"model.objective.beta_dpo 5000: at {self.beta_dpo:g} the loss begins to saturate where errors differ "
                f"by {2 / self.beta_dpo:.2g}, more than errors do; such a beta is for summed errors or language models"
            ]
        return []

    def formula(self) -> str:
        mix = f" + {self.sft_mix:g} mean(L_w)" if self.sft_mix else ""
        return f"{self.name()}: {self._loss_text()}{mix}, inside = -0.5 {self.beta_dpo:g} ((L_w - L_l) - (R_w - R_l))"

    def _loss_text(self) -> str:
        if not self.label_smoothing:
            return f"mean({FORMULAS[self.loss_type]})"
        kept = f"{1 - self.label_smoothing:g}"
        return f"mean(-{kept} logsigmoid(inside) - {self.label_smoothing:g} logsigmoid(-inside))"


class BalancedDPO(DiffusionDPO):
    """Diffusion-DPO's loss on pairs ordered by the vote of several scorers (Tamboli et al., arXiv 2503.12575).

    A reconstruction: it puts the paper's ideas (consensus of votes, updates of the reference) into the loss of
    Diffusion-DPO, because the exact form of its equations is not known to us. `data.vote` orders the pairs and
    `ReferenceUpdate` moves the reference; pairs without a vote are refused.

    Args:
        beta_dpo: see `DiffusionDPO`.
        loss_type: see `DiffusionDPO`.
        label_smoothing: see `DiffusionDPO`.
        sft_mix: see `DiffusionDPO`.
        soft: learn how clear a vote was, which is ours: the loss is -q logsigmoid(inside) - (1 - q) logsigmoid(-inside)
            with q = (1 + share for - share against) / 2, at least 0.5 and at most 0.98; 0.5 where the tie rule decided.
    """

    needs_vote = True

    def __init__(
        self,
        beta_dpo: float = 5000.0,
        loss_type: LossType = "sigmoid",
        label_smoothing: float = 0.0,
        sft_mix: float = 0.0,
        soft: bool = False,
    ) -> None:
        super().__init__(beta_dpo, loss_type, label_smoothing, sft_mix)
        if soft and (loss_type != "sigmoid" or label_smoothing):
            raise UserValueError(
                "soft is true, which gives each pair a label_smoothing of its own: leave label_smoothing at 0, and "
                "loss_type at sigmoid."
            )
        self.soft = soft
        self.needs = frozenset({"confidence"}) if soft else frozenset()

    def _losses(self, inside: Tensor, facts: PairFacts | None) -> Tensor:
        if not self.soft:
            return super()._losses(inside, facts)
        return soft_sigmoid(inside, given(facts, "confidence").to(inside).clamp(max=CERTAIN))

    def _loss_text(self) -> str:
        if not self.soft:
            return super()._loss_text()
        return f"mean(-q logsigmoid(inside) - (1 - q) logsigmoid(-inside)), q by the vote, at most {CERTAIN}"
