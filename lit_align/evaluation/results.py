"""What an evaluation found: every model against every other, as plain values and as a table."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import combinations
from typing import Any

import torch

from lit_align.evaluation.win_rates import compare

Scores = Mapping[str, Mapping[str, list[float]]]  # by scorer and model: one a prompt
HEADER = ("scorer", "wins", "ties", "losses", "win rate", "95 %", "mean", "against", "difference", "95 %", "sign test")


def compare_all(scores: Scores, tolerances: Mapping[str, float]) -> list[dict[str, Any]]:
    """All pairs of models, those against the first one before the others.

    Args:
        scores: of the same prompts by all models, the base's first.
        tolerances: by scorer, see `compare`.
    """
    models = list(next(iter(scores.values())))
    return [
        {"model": model, "against": other, **asdict(compare(_of(scores, model), _of(scores, other), tolerances))}
        for other, model in combinations(models, 2)
    ]


def _of(scores: Scores, model: str) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(by_model[model], dtype=torch.float64) for name, by_model in scores.items()}


def to_text(comparison: Mapping[str, Any], prompts: int) -> str:
    """A comparison for the terminal."""
    rows = [HEADER, *(_row(name, outcome) for name, outcome in comparison["scorers"].items())]
    low, high = comparison["macro_interval"]
    rows.append(("macro", "", "", "", _percent(comparison["macro"]), f"{_percent(low)} to {_percent(high)}", *[""] * 5))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    title = f"{comparison['model']} against {comparison['against']}, {prompts} prompts"
    return "\n".join([title, *(f"  {line.rstrip()}" for line in lines)])


def _row(name: str, outcome: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = outcome["interval"]
    least, greatest = outcome["difference_interval"]
    return (
        name,
        *(str(outcome[count]) for count in ("wins", "ties", "losses")),
        _percent(outcome["win_rate"]),
        f"{_percent(low)} to {_percent(high)}",
        f"{outcome['mean']:.4g}",
        f"{outcome['mean_against']:.4g}",
        f"{outcome['difference']:+.3g}",
        f"{least:+.3g} to {greatest:+.3g}",
        f"p {outcome['sign_test']:.2g}",
    )


def _percent(share: float) -> str:
    return f"{share:.1%}"
