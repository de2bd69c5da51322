"""Words, marks and digits of report.html; its templates use these functions as filters."""

from collections.abc import Mapping, Sequence
from math import floor, log10
from typing import Any

MARKS = {"better": "▲", "open": "○", "worse": "▼"}  # by `side`
MINUS = "\N{MINUS SIGN}"


def side(interval: Sequence[float]) -> str:
    """Where the interval of a win rate lies: above 50 % (`better`), below (`worse`) or around it (`open`)."""
    low, high = interval
    return "better" if low > 0.5 else "worse" if high < 0.5 else "open"


def by_side(scorers: Mapping[str, Mapping[str, Any]]) -> str:
    """List which scorers find a model better, undecided and worse, as in "better by a and b, worse by c"."""
    said = {"better": "better by", "open": "undecided by", "worse": "worse by"}
    names = {kind: [name for name, outcome in scorers.items() if side(outcome["interval"]) == kind] for kind in said}
    return ", ".join(f"{said[kind]} {_listed(found)}" for kind, found in names.items() if found)


def decimals(step: float) -> int:
    """Digits after the point that show steps of this size."""
    return min(9, max(0, -floor(log10(step)))) if step > 0 else 3


def digits(outcome: Mapping[str, Any]) -> int:
    """Digits after the point for the mean scores of an outcome: a tenth of the interval of their difference shows."""
    known = outcome["difference_interval"]
    return 3 if known is None else decimals((known[1] - known[0]) / 10)


def percent(share: float) -> str:
    """Write a share of 0 to 1 in percent."""
    return f"{100 * share:.1f} %"


def percents(interval: Sequence[float]) -> str:
    """Write both ends of an interval of shares in percent."""
    low, high = interval
    return f"{100 * low:.1f} to {percent(high)}"


def number(value: float, digits: int, sign: str = "-") -> str:
    """Write a number with a typographic minus; one that rounds to zero has no sign. Sign `+` shows a plus too."""
    text = f"{value:{sign},.{digits}f}"
    return f"{0:.{digits}f}" if not float(text.replace(",", "")) else text.replace("-", MINUS)


def p_value(p: float) -> str:
    """Write a p value with the digits that matter."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
