"""Comparisons of every model with every other, as plain values and as text tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import torch

from lit_align.evaluation.win_rates import compare

Scores = Mapping[str, Mapping[str, list[float]]]  # by scorer and model, one per prompt
COUNTS = ("wins", "ties", "losses")
HEADER = ("scorer", *COUNTS, "win rate", "95 %", "mean", "against", "difference", "95 %", "sign test")


def compare_all(scores: Scores, tolerances: Mapping[str, float]) -> list[dict[str, Any]]:
    """Compare all pairs of models; the pairs with the first model come first.

    Args:
        scores: of equal prompts for all models, the base first.
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
    """Write a comparison as a table for the terminal."""
    rows = [HEADER, *(_row(name, outcome) for name, outcome in comparison["scorers"].items()), _macro(comparison)]
    return _table(f"{comparison['model']} against {comparison['against']}, {prompts} prompts", rows)


def overview(comparisons: Sequence[Mapping[str, Any]], base: str) -> str:
    """Write the win rates of all models against the base as a table for the terminal; "" if there is one model.

    Args:
        comparisons: from `compare_all`.
        base: name of the base.
    """
    against_base = [comparison for comparison in comparisons if comparison["against"] == base]
    if len(against_base) < 2:
        return ""
    rows = [("model", "macro", *against_base[0]["scorers"])]
    for comparison in against_base:
        rates = [comparison["macro"], *(outcome["win_rate"] for outcome in comparison["scorers"].values())]
        rows.append((comparison["model"], *map(_percent, rates)))
    return _table(f"win rates against {base}", rows)


def _table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Align the first column left and the others right, below a title."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join([title, *(f"  {line.rstrip()}" for line in lines)])


def _macro(comparison: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = comparison["macro_interval"]
    return (
        "macro",
        *(str(comparison[f"macro_{count}"]) for count in COUNTS),
        _percent(comparison["macro"]),
        f"{_percent(low)} to {_percent(high)}",
        *[""] * 4,  # scores of several scorers have no common scale
        f"p {comparison['macro_sign_test']:.2g}",
    )


def _row(name: str, outcome: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = outcome["interval"]
    known = outcome["difference_interval"]
    return (
        name,
        *(str(outcome[count]) for count in COUNTS),
        _percent(outcome["win_rate"]),
        f"{_percent(low)} to {_percent(high)}",
        f"{outcome['mean']:.4g}",
        f"{outcome['mean_against']:.4g}",
        f"{outcome['difference']:+.3g}",
        "unknown" if known is None else f"{known[0]:+.3g} to {known[1]:+.3g}",
        f"p {outcome['sign_test']:.2g}",
    )


def _percent(share: float) -> str:
    return f"{share:.1%}"
