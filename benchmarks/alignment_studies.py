"""Studies of benchmarks/objectives.py: methods, bases, pairs and scorers."""

from dataclasses import dataclass
from functools import partial

from benchmarks.alignment_runs import PAIRS, Method
from lit_align.objectives import SFT, BalancedDPO, DiffusionDPO, MaPO, PaperMaPO
from lit_align.scoring.vote import Rule, Vote

BETA_DPO, UPDATE_EVERY = 5000.0, 20
BETA_PAPER = 64.0  # the paper's best value for styles
LADDER = (6e-7, 2e-6, 6e-6, 2e-5, 6e-5, 2e-4, 6e-4, 2e-3)  # learning rates
# A difference within a tenth of a score's deviation on the bundled pairs is a tie, in votes and in win rates.
TOLERANCES = {"clip": 0.004, "style": 0.4, "colour": 4.0, "sharpness": 1600.0}
TRIO = ["clip", "style", "colour"]

dpo, balanced = partial(DiffusionDPO, BETA_DPO), partial(BalancedDPO, BETA_DPO)


def vote(voters: list[str], rule: Rule = "majority", ties: str = "skip") -> Vote:
    """A vote in which near ties abstain."""
    margins = {name: TOLERANCES[name] for name in voters if name in TOLERANCES}
    return Vote(voters, rule, ties, margins=margins)


def next_rate(worths: dict[float, float]) -> float | None:
    """Rate to try next, beside the best if that lies at an end of those tried; none: the best is known.

    Of equally good rates the lowest counts as the best.
    """
    tried = sorted(worths)
    best = max(tried, key=worths.__getitem__)
    step = -1 if best == tried[0] else 1 if best == tried[-1] else 0
    index = LADDER.index(best) + step
    return LADDER[index] if step and 0 <= index < len(LADDER) else None


@dataclass(frozen=True)
class Study:
    """A question, and what answers it."""

    pairs: str
    bases: tuple[str, ...]
    scorers: tuple[str, ...]  # of the win rates
    rates: tuple[float, ...]  # from LADDER; every method tries them first
    methods: dict[str, Method]
    style_counts: bool  # whether the share of images in the preferred style helps to choose the learning rate


STUDIES = {
    "mismatch": Study(
        pairs=f"{PAIRS}/high_contrast-over-color",
        bases=("bundled", "turned"),
        scorers=("clip", "sharpness"),
        rates=(6e-6, 2e-5, 6e-5, 2e-4),
        methods={
            "sft": Method("SFT", SFT),
            "dpo": Method("DiffusionDPO", dpo),
            "mapo": Method("MaPO, released form", MaPO),
            "paper_mapo": Method("MaPO, paper's form", partial(PaperMaPO, BETA_PAPER)),
            "balanced": Method(
                "BalancedDPO", balanced, vote(["human", "clip", "sharpness"], ties="human"), UPDATE_EVERY
            ),
        },
        style_counts=True,
    ),
    "votes": Study(
        pairs=f"{PAIRS}/*",
        bases=("bundled",),
        scorers=tuple(TRIO),
        rates=(6e-6, 2e-5, 6e-5),
        methods={
            **{name: Method(f"DPO on {name}", dpo, vote([name], "single")) for name in TRIO},
            "random": Method("DPO on a random scorer", dpo, vote(TRIO, "random")),
            "vanilla": Method("DPO on the sum of scores", dpo, vote(TRIO, "vanilla")),
            "normalized": Method("DPO on the sum of normalised scores", dpo, vote(TRIO, "normalized")),
            "static": Method("BalancedDPO, static reference", balanced, vote(TRIO)),
            "moving": Method("BalancedDPO, moving reference", balanced, vote(TRIO), UPDATE_EVERY),
        },
        style_counts=False,
    ),
}
