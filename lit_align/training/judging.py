"""Apply an objective to predictions, with the facts that it asks for beside errors."""

import torch
from torch import Tensor

from lit_align.diffusion import NoiseSchedule, pair_errors, pair_overlap
from lit_align.diffusion.draws import Draw
from lit_align.objectives import Objective
from lit_align.types import ObjectiveOutput, PairErrors, PairFacts, PairInfo
from lit_align.user_errors import UserValueError


def check_facts(objective: Objective, schedule: NoiseSchedule) -> None:
    """Refuse an objective that asks for what is not known, or for what would say nothing of this model.

    Raises:
        UserValueError: naming it.
    """
    if unknown := set(objective.needs) - set(PairFacts._fields):
        raise UserValueError(f"{objective.name()} needs {sorted(unknown)}; known are {', '.join(PairFacts._fields)}.")
    if objective.needs_v and schedule.prediction_type == "epsilon":
        raise UserValueError(
            f"model.objective is {objective.name()}, but this model predicts the noise, so that its errors are those "
            "of the noise already. Take NoiseErrors out."
        )
    if "confidence" in objective.needs and not objective.needs_vote:
        raise UserValueError(f"{objective.name()} needs confidence, which only a vote has: set needs_vote.")


def term_names(objective: Objective) -> list[str]:
    """List the names of the terms that an objective logs, by a try on one pair."""
    one = torch.ones(1)
    errors = PairErrors(one, one)
    output = objective(errors, errors, PairFacts(one, one, one)) if objective.needs else objective(errors, errors)
    return list(output.terms)


def judge(
    objective: Objective,
    schedule: NoiseSchedule,
    prediction: Tensor,
    target: Tensor,
    reference: PairErrors | None,
    draw: Draw,
    pairs: PairInfo,
) -> tuple[ObjectiveOutput, PairErrors]:
    """Return the objective's losses, and the policy's errors.

    Args:
        objective: of the run.
        schedule: of the noise.
        prediction: (2 * batch, ...) of the policy, the chosen images first.
        target: of the prediction.
        reference: its errors, if the objective needs them.
        draw: noise and timesteps of the pairs.
        pairs: of the batch.

    Raises:
        UserValueError: if the objective learns from votes, and nobody has voted.
    """
    if objective.needs_vote and not pairs.voted:
        raise UserValueError(
            f"{objective.name()} learns from votes, but these pairs are ordered by their human label. Set data.vote, "
            "or choose DiffusionDPO."
        )
    policy, needs = pair_errors(prediction, target), objective.needs
    if not needs:
        return objective(policy, reference), policy
    facts = PairFacts(
        overlap=pair_overlap(prediction, target) if "overlap" in needs else None,
        alpha_bar=schedule.alphas_cumprod[draw.timesteps] if "alpha_bar" in needs else None,
        confidence=(1 + pairs.balance.float()) / 2 if "confidence" in needs else None,
    )
    return objective(policy, reference, facts), policy
