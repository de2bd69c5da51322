"""The part of report.html that needs no script: verdicts, intervals as a plot, and tables."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import floor, log10
from typing import Any

SIDES = ("better", "open", "worse")  # where an interval of a win rate lies, of 50 %; also the CSS classes
MINUS = "\N{MINUS SIGN}"
COUNTS = ("wins", "ties", "losses")
SIGN_TEST = "sign test, p"
MARKS = {"better": "▲", "open": "○", "worse": "▼"}


def side(interval: Sequence[float]) -> str:
    """Where a win rate's interval lies: above 50 % (`better`), below (`worse`) or around it (`open`)."""
    low, high = interval
    return "better" if low > 0.5 else "worse" if high < 0.5 else "open"


def decimals(step: float) -> int:
    """Digits after the point by which steps of this size show."""
    return min(9, max(0, -floor(log10(step)))) if step > 0 else 3


def verdict(comparison: Mapping[str, Any]) -> str:
    """One sentence, as a list item: which model is better by the macro-average, and by which scorers."""
    model, against = (f"<strong>{escape(comparison[key])}</strong>" for key in ("model", "against"))
    macro = side(comparison["macro_interval"])
    start = {
        "better": f"{model} is better than {against}",
        "open": f"{model} and {against} are not told apart",
        "worse": f"{model} is worse than {against}",
    }[macro]
    names: dict[str, list[str]] = {kind: [] for kind in SIDES}
    for name, outcome in comparison["scorers"].items():
        names[side(outcome["interval"])].append(escape(name))
    said = {"better": "better by", "open": "undecided by", "worse": "worse by"}
    parts = ", ".join(f"{said[kind]} {_listed(names[kind])}" for kind in SIDES if names[kind])
    rate = f"{_percent(comparison['macro'])} ({_interval(comparison['macro_interval'])})"
    return f'<li class="{macro}">{MARKS[macro]} {start}: macro-average win rate {rate}; {parts}.</li>'


def all_pairs(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The win rates of all comparisons in one table; nothing where there is one comparison."""
    if len(comparisons) < 2:
        return ""
    scorers = list(comparisons[0]["scorers"])
    rows = []
    for comparison in comparisons:
        outcomes = comparison["scorers"]
        cells = [_rate("macro-average", comparison["macro"], comparison["macro_interval"])]
        cells += [_rate(name, outcomes[name]["win_rate"], outcomes[name]["interval"]) for name in scorers]
        rows.append(_row(_against(comparison), cells))
    head = _head(["model", "macro-average", *scorers])
    table = f'<table class="pairs stack">{head}<tbody>{"".join(rows)}</tbody></table>'
    return f"<section><h2>All pairs of models: win rates</h2>{table}</section>"


def summary(number: int, comparison: Mapping[str, Any]) -> str:
    """Win rates with their intervals, and mean scores, of one comparison."""
    return (
        f'<section class="summary" id="comparison-{number}"><h2>{_against(comparison)}</h2>'
        f"{_win_rates(comparison)}{_means(comparison)}</section>"
    )


def _win_rates(comparison: Mapping[str, Any]) -> str:
    rows = []
    for name, outcome in comparison["scorers"].items():
        rate, interval = outcome["win_rate"], outcome["interval"]
        counts = [_cell(kind, f"{outcome[kind]:,}") for kind in COUNTS]
        rows.append(_row(escape(name), [_plot(rate, interval), *_rate_cells(rate, interval), *counts]))
    rate, interval = comparison["macro"], comparison["macro_interval"]
    counts = [_cell(kind, f"{comparison[f'macro_{kind}']:,}") for kind in COUNTS]
    macro = _row("macro-average", [_plot(rate, interval), *_rate_cells(rate, interval), *counts], "macro")
    axis = _row("", [f'<td class="plot">{_axis()}</td>', *["<td></td>"] * 5])
    head = _head(["scorer", "win rate, 95 % interval", "", "", "wins", "ties", "losses"])
    return (
        f'<table class="rates stack">{head}<tbody>{"".join(rows)}{macro}</tbody>'
        f'<tfoot aria-hidden="true">{axis}</tfoot></table>'
    )


def _means(comparison: Mapping[str, Any]) -> str:
    rows = []
    for name, outcome in comparison["scorers"].items():
        known = outcome["difference_interval"]
        digits = 3 if known is None else decimals((known[1] - known[0]) / 10)
        cells = [
            _cell(f"{comparison['against']}, mean", _number(outcome["mean_against"], digits)),
            _cell(f"{comparison['model']}, mean", _number(outcome["mean"], digits)),
            _cell("difference", f"{_number(outcome['difference'], digits, '+')}"),
            _cell("95 % interval", "unknown" if known is None else _ends(known, digits)),
            _cell(SIGN_TEST, _p_value(outcome["sign_test"])),
        ]
        rows.append(_row(escape(name), cells))
    rows.append(_row("macro-average", [*["<td></td>"] * 4, _cell(SIGN_TEST, _p_value(comparison["macro_sign_test"]))]))
    columns = ["scorer", f"{comparison['against']}, mean", f"{comparison['model']}, mean"]
    head = _head([*columns, "difference", "95 % interval", SIGN_TEST])
    return f'<table class="means stack">{head}<tbody>{"".join(rows)}</tbody></table>'


def _plot(rate: float, interval: Sequence[float]) -> str:
    """Dot and whisker on a scale of 0 to 100 %; lengths in percent, so that it is as wide as its column."""
    low, high = interval
    said = f"{_percent(rate)}, 95 % interval {_interval(interval)}"
    return (
        f'<td class="plot"><svg class="{side(interval)}" role="img" aria-label="{said}">'
        '<line class="half" x1="50%" x2="50%" y1="0" y2="100%"/>'
        f'<line class="range" x1="{100 * low:.2f}%" x2="{100 * high:.2f}%" y1="50%" y2="50%"/>'
        f'<circle cx="{100 * rate:.2f}%" cy="50%" r="5"/></svg></td>'
    )


def _axis() -> str:
    anchors = {0: "start", 25: "middle", 50: "middle", 75: "middle", 100: "end"}
    marks = (f'<text x="{at}%" y="1em" text-anchor="{anchor}">{at} %</text>' for at, anchor in anchors.items())
    return f'<svg class="axis">{"".join(marks)}</svg>'


def _rate_cells(rate: float, interval: Sequence[float]) -> list[str]:
    kind = side(interval)
    mark = f'<span class="mark">{MARKS[kind]}</span>'
    return [
        f'<td class="rate {kind}">{mark} {_percent(rate)}</td>',
        f'<td class="interval pale">{_interval(interval)}</td>',
    ]


def _rate(label: str, rate: float, interval: Sequence[float]) -> str:
    kind = side(interval)
    said = f"{MARKS[kind]} {_percent(rate)}"
    return _cell(label, f'<span class="rate {kind}">{said}</span><br><small>{_interval(interval)}</small>')


def _against(comparison: Mapping[str, Any]) -> str:
    return f"{escape(comparison['model'])} against {escape(comparison['against'])}"


def _head(columns: Iterable[str]) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    return f"<thead><tr>{cells}</tr></thead>"


def _row(name: str, cells: Iterable[str], kind: str = "") -> str:
    """A row whose name and cells are HTML already."""
    return f'<tr class="{kind}"><th scope="row">{name}</th>{"".join(cells)}</tr>'


def _cell(label: str, content: str) -> str:
    """A cell of HTML; the label stands above it on narrow screens, which show no head of the table."""
    return f'<td data-label="{escape(label)}">{content}</td>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{100 * low:.1f} to {_percent(high)}"


def _ends(interval: Sequence[float], digits: int) -> str:
    """Of an interval of differences."""
    low, high = interval
    return f"{_number(low, digits, '+')} to {_number(high, digits, '+')}"


def _number(value: float, digits: int, sign: str = "-") -> str:
    text = f"{value:{sign},.{digits}f}"
    return f"{0:.{digits}f}" if not float(text.replace(",", "")) else text.replace("-", MINUS)


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
