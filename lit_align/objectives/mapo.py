"""Margin-aware preference optimization (MaPO), arXiv 2406.06424, in its two published forms.

`L_w` and `L_l` are the errors of the chosen and the rejected image. Both forms compare them by
phi(x) = x / (exp(x) - 1), which falls from phi(0) = 1 to 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align.objectives.base import Objective, in_double, positive
from lit_align.types import ObjectiveOutput, PairErrors, PairFacts


class MaPO(Objective):
    """MaPO as its authors released it (repository mapo-t2i/mapo, 2024).

        margin = T (phi(s L_w) - phi(s L_l))
        loss   = L_w - beta_mapo * logsigmoid(margin)

    Args:
        beta_mapo: weight of the margin term.
        snr_value: s, a constant instead of the paper's weight per timestep.
        margin_scale: T, in the release the scheduler's number of training timesteps.
    """

    needs_reference = False

    def __init__(self, beta_mapo: float = 0.1, snr_value: float = 0.5, margin_scale: float = 1000.0) -> None:
        self.beta_mapo = positive("beta_mapo", beta_mapo)
        self.snr_value = positive("snr_value", snr_value)
        self.margin_scale = positive("margin_scale", margin_scale)

    def __call__(
        self, policy: PairErrors, reference: PairErrors | None, facts: PairFacts | None = None
    ) -> ObjectiveOutput:
        chosen, rejected = in_double(policy)
        margin = self.margin_scale * phi_margin(self.snr_value * chosen, self.snr_value * rejected)
        return _output(policy, -self.beta_mapo * F.logsigmoid(margin), margin)

    def formula(self) -> str:
        return (
            f"MaPO (released form): mean(L_w) - {self.beta_mapo:g} mean(logsigmoid({self.margin_scale:g} "
            f"(phi({self.snr_value:g} L_w) - phi({self.snr_value:g} L_l)))), phi(x) = x / (exp(x) - 1)"
        )


class PaperMaPO(Objective):
    """MaPO as the paper's second version prints it (v2, December 2025, equations 9 to 11).

        margin = phi(L_w)**beta - phi(L_l)**beta
        loss   = L_w - (1 / beta) * logsigmoid(margin)

    Beta as an exponent is our reading of the paper's extracted text. The paper's best values (Table 4): preference 8,
    culture 32, safety 64, style 64, personalisation 1024.

    Args:
        beta_paper: beta; greater values weigh small differences more and the margin term less.
    """

    needs_reference = False

    def __init__(self, beta_paper: float = 8.0) -> None:
        self.beta_paper = positive("beta_paper", beta_paper)

    def __call__(
        self, policy: PairErrors, reference: PairErrors | None, facts: PairFacts | None = None
    ) -> ObjectiveOutput:
        margin = phi_margin(*in_double(policy), self.beta_paper)
        return _output(policy, -F.logsigmoid(margin) / self.beta_paper, margin)

    def formula(self) -> str:
        beta = f"{self.beta_paper:g}"
        return (
            f"MaPO (paper form): mean(L_w) - 1/{beta} mean(logsigmoid(phi(L_w)^{beta} - phi(L_l)^{beta})), "
            "phi(x) = x / (exp(x) - 1)"
        )


def _output(policy: PairErrors, preference: Tensor, margin: Tensor) -> ObjectiveOutput:
    terms = {"loss/sft": policy.chosen.detach(), "loss/preference": preference.detach().to(policy.chosen.dtype)}
    return ObjectiveOutput(policy.chosen + preference, margin.detach().to(policy.chosen.dtype), terms)


def phi_margin(chosen: Tensor, rejected: Tensor, power: float = 1.0) -> Tensor:
    """Compute phi(chosen)**power - phi(rejected)**power, (batch,), without cancellation and overflow.

    Close powers differ by less than their rounding, above all near zero error, where both are 1. There the
    difference is computed from logarithms: exp(a) - exp(b) = exp(b) (exp(a - b) - 1).
    """
    a, b = power * log_phi(chosen), power * log_phi(rejected)
    close = (a - b).clamp(-1.0, 1.0)
    return torch.where((a - b).abs() < 1.0, b.exp() * torch.expm1(close), a.exp() - b.exp())


def log_phi(x: Tensor) -> Tensor:
    """Compute log(x / (exp(x) - 1)) for x >= 0, with value and gradient exact to rounding in float32.

    Below 1 it uses the series of -x/2 - log(sinh(x/2) / (x/2)), whose first omitted term is below 1e-8 of the value;
    above 1, logarithms that cannot overflow. In float32, `x / (exp(x) - 1)` loses 20 % of the gradient at x = 1e-3
    and is not finite at 0.
    """
    near, far = x.clamp(max=1.0), x.clamp(min=1.0)
    square = near * near
    series = square * (-1 / 24 + square * (1 / 2880 + square * (-1 / 181440 + square * (1 / 9676800))))
    return torch.where(x < 1.0, series - near / 2, far.log() - far - torch.log(-torch.expm1(-far)))
