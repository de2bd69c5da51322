"""Objectives around another objective, whose errors they change before it sees them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_align.objectives.base import Objective, given
from lit_align.types import ObjectiveOutput, PairErrors, PairFacts
from lit_align.user_errors import UserValueError


class Wrapper(Objective):
    """Base of the objectives around another one, which has the loss, the margin and the needs.

    Args:
        objective: sees the changed errors.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.needs_reference, self.needs_vote = objective.needs_reference, objective.needs_vote
        self.needs, self.needs_v = frozenset(objective.needs), objective.needs_v
        self.compares, self.form = objective.compares, objective.form
        within = objective
        while isinstance(within, Wrapper):
            if type(within) is type(self):
                raise UserValueError(f"model.objective: {self.name()} has {type(self).__name__} twice. Take one out.")
            within = within.objective

    def name(self) -> str:
        return f"{type(self).__name__}({self.objective.name()})"

    def changed_since(self, form: int, settings: Mapping[str, Any]) -> str | None:
        return self.objective.changed_since(form, settings)

    def concerns(self) -> list[str]:
        inner = self.objective.concerns()
        return [concern.replace("model.objective.", "model.objective.objective.", 1) for concern in inner]

    def inner(self, policy: PairErrors, reference: PairErrors | None, facts: PairFacts | None) -> ObjectiveOutput:
        """Call the inner objective, with facts if it asks for some."""
        if not self.objective.needs:
            return self.objective(policy, reference)
        return self.objective(policy, reference, facts)


class WinnerGuard(Wrapper):
    """Damps the rejected image's gradient where both residuals point the same way (Diffusion-SDPO).

        factor = clamp((1 - mu) mean(e_w^2) / mean(e_w e_l), 0, 1), and 1 where mean(e_w e_l) is not positive

    e_w and e_l are the residuals of the prediction on both images. The released code takes one factor for a
    micro-batch; this one is of each pair, and depends on no batch or rank. The value of the loss is unchanged. Logs
    `guard_factor`.

    Args:
        objective: of pairs, such as DiffusionDPO.
        mu: at 0, a step that moved both outputs of a pair alike would not raise the chosen error, which says little of
            the step in weights; 1 leaves the chosen gradient alone wherever residuals overlap. Diffusion-SDPO's
            scripts: 0.9 for SD1.5, 0.6 for SDXL.
    """

    def __init__(self, objective: Objective, mu: float = 0.9) -> None:
        super().__init__(objective)
        if not objective.compares:
            raise UserValueError(
                f"model.objective is WinnerGuard, but {objective.name()} does not train on the rejected image. Take "
                "the guard out."
            )
        if not 0 <= mu <= 1:
            raise UserValueError(f"mu is {mu}; it must lie between 0 and 1.")
        self.mu = float(mu)
        self.needs |= {"overlap"}

    def __call__(
        self, policy: PairErrors, reference: PairErrors | None, facts: PairFacts | None = None
    ) -> ObjectiveOutput:
        chosen, overlap = policy.chosen.detach(), given(facts, "overlap").to(policy.chosen)
        positive = overlap > 0
        ratio = (1 - self.mu) * chosen / torch.where(positive, overlap, 1.0)
        factor = torch.where(positive, ratio.clamp(0, 1), 1.0)
        still = policy.rejected.detach()
        guarded = PairErrors(policy.chosen, still + factor * (policy.rejected - still))
        output = self.inner(guarded, reference, facts)
        return output._replace(terms={**output.terms, "guard_factor": factor})

    def formula(self) -> str:
        return (
            f"{self.objective.formula()}; WinnerGuard: the gradient of L_l times "
            f"clamp({1 - self.mu:g} L_w / mean(e_w e_l), 0, 1)"
        )


class NoiseErrors(Wrapper):
    """Turns the errors of a model that predicts v into those of the noise, alpha_bar times as large.

    With equal predictions, the noise's error is alpha_bar times v's (arXiv 2202.00512), so that a beta acts at high
    noise as it does on a model that predicts the noise. The papers' losses on SD2.1 are those of v.

    Args:
        objective: of pairs or of the chosen image.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self.needs, self.needs_v = self.needs | {"alpha_bar"}, True

    def __call__(
        self, policy: PairErrors, reference: PairErrors | None, facts: PairFacts | None = None
    ) -> ObjectiveOutput:
        alpha_bar = given(facts, "alpha_bar").to(policy.chosen)
        known = None if reference is None else _scaled(reference, alpha_bar)
        if facts is not None and facts.overlap is not None:  # of a guard within
            facts = facts._replace(overlap=alpha_bar * facts.overlap)
        return self.inner(_scaled(policy, alpha_bar), known, facts)

    def formula(self) -> str:
        return f"{self.objective.formula()}; NoiseErrors: L = alpha_bar times the mean squared error of v, R likewise"


def _scaled(errors: PairErrors, factor: Tensor) -> PairErrors:
    return PairErrors(factor * errors.chosen, factor * errors.rejected)
