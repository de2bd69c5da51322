"""From measurements to numbers with intervals, to Markdown and to plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lit_align.common.files import atomic_path
from lit_align.evaluation.intervals import wilson

RESAMPLES = 10_000
TILE, SHOWN, LABEL = 32, 12, 190  # pixels of an image, images of a row, pixels of its label


def points(found: Mapping[str, Any], base: Mapping[str, Any], tolerances: Mapping[str, float]) -> dict[str, Tensor]:
    """Points (prompts,) by scorer: 1 where the image wins against the base's image, 1/2 for a tie, 0 for a loss."""
    won = {}
    for name, scores in found["scores"].items():
        difference = torch.tensor(scores, dtype=torch.float64) - torch.tensor(base["scores"][name], dtype=torch.float64)
        won[name] = (difference.sign() * (difference.abs() > tolerances[name]) + 1) / 2
    return won


def worth(found: Mapping[str, Any], base: Mapping[str, Any], tolerances: Mapping[str, float], style: bool) -> float:
    """Measure that chooses a learning rate: the mean of style share and CLIP's win rate, or the macro win rate."""
    won = points(found, base, tolerances)
    if style:
        return (sum(found["in_style"]) / len(found["in_style"]) + won["clip"].mean().item()) / 2
    return torch.stack(list(won.values())).mean().item()


def by_seed_and_prompt(
    seeds: Sequence[Mapping[str, Any]], base: Mapping[str, Any], tolerances: Mapping[str, float]
) -> dict[str, Tensor]:
    """Values (seeds, prompts): style, the win rate by each scorer, macro."""
    values = {"style": torch.tensor([seed["in_style"] for seed in seeds], dtype=torch.float64)}
    won = [points(seed, base, tolerances) for seed in seeds]
    values |= {name: torch.stack([one[name] for one in won]) for name in won[0]}
    return values | {"macro": torch.stack([values[name] for name in won[0]]).mean(0)}


def estimate(values: Tensor) -> list[float]:
    """Mean and 95 % interval of values (seeds, prompts), of which both are samples.

    Seeds and prompts are resampled independently (the pigeonhole bootstrap, Owen 2007, arXiv 0711.1394), and the
    interval is widened because few seeds understate the spread. If all values are 0, or all are 1, it is Wilson's
    interval over the prompts.
    """
    mean, (seeds, prompts) = values.mean().item(), values.shape
    if values.min() == values.max() and mean in (0.0, 1.0):
        return [mean, *(wilson(prompts, 0, 0) if mean else wilson(0, 0, prompts))]
    generator = torch.Generator().manual_seed(0)
    means = (_weights(seeds, generator) @ values).mul(_weights(prompts, generator)).sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    wider = (seeds / max(1, seeds - 1)) ** 0.5
    least = 0.0 if values.min() >= 0 else -1.0
    return [mean, *(min(1.0, max(least, mean + (end - mean) * wider)) + 0.0 for end in (low, high))]  # no -0.0


def _weights(count: int, generator: torch.Generator) -> Tensor:
    """Resample `count` things with replacement: (RESAMPLES, count) shares of each."""
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    ones = torch.ones(RESAMPLES, count, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones) / count


def about_errors(seeds: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> dict[str, float]:
    """Compare held-out errors with the base's, mean over seeds."""
    before = {side: torch.tensor(base["errors"][side]) for side in ("chosen", "rejected")}
    found = []
    for seed in seeds:
        after = {side: torch.tensor(seed["errors"][side]) for side in before}
        drift = {side: after[side] - before[side] for side in before}
        found.append(
            {
                "accuracy": (after["chosen"] < after["rejected"]).double().mean().item(),
                "accuracy_against_base": (drift["chosen"] < drift["rejected"]).double().mean().item(),
                "chosen_drift": (drift["chosen"].mean() / before["chosen"].mean()).item(),
                "rejected_drift": (drift["rejected"].mean() / before["rejected"].mean()).item(),
                "chosen_worse": (drift["chosen"] > 0).double().mean().item(),
                "diversity": seed["diversity"] / base["diversity"],
            }
        )
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def mismatch(base: Mapping[str, Any]) -> float:
    """Ratio of the base's held-out errors, chosen over rejected."""
    chosen, rejected = (torch.tensor(base["errors"][side]).mean() for side in ("chosen", "rejected"))
    return (chosen / rejected).item()


def percent(value: Sequence[float]) -> str:
    """Write mean and interval in percent."""
    mean, low, high = (100 * number for number in value)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def markdown(title: str, rows: Mapping[str, Mapping[str, Any]], scorers: Sequence[str], style: bool) -> str:
    """Write a table with a row per method."""
    names = (["style share"] if style else []) + [f"wins, {name}" for name in scorers] + ["macro"] * (not style)
    names += ["accuracy", "chosen error", "rejected error", "diversity", "pairs", "rate"]
    lines = [f"**{title}**", "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for method, row in rows.items():
        keys = (["style"] if style else []) + list(scorers) + ["macro"] * (not style)
        cells = [percent(row[key]) for key in keys]
        errors = row["errors"]
        cells += [f"{100 * errors['accuracy']:.0f}"]
        cells += [f"{100 * errors[side]:+.0f} %" for side in ("chosen_drift", "rejected_drift")]
        cells += [f"{errors['diversity']:.2f}", f"{row['pairs']}", f"{row['rate']:g}"]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], path: Path) -> None:
    """Plot dots with intervals: a panel per measure, a colour per group, a row per method.

    Args:
        panels: by title, by group, by method: mean, low, high, as shares of 1.
        path: PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = list(next(iter(next(iter(panels.values())).values())))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(2.6 + 2.3 * len(panels), 0.7 + 0.42 * len(methods)))
    colours = ("#0072b2", "#d55e00", "#009e73")  # Okabe and Ito, for colour-blind readers too
    for axis, (title, groups) in zip(axes, panels.items(), strict=True):
        for number, (group, rows) in enumerate(groups.items()):
            heights = [-row + 0.18 * (len(groups) - 1) - 0.36 * number for row in range(len(methods))]
            mean, low, high = (torch.tensor([rows[name][i] for name in methods]) * 100 for i in range(3))
            reach = torch.stack([mean - low, high - mean]).clamp(min=0)
            axis.errorbar(
                mean, heights, xerr=reach, fmt="os^"[number], color=colours[number], capsize=2, ms=4, label=group
            )
        axis.axvline(50, color="grey", lw=0.8, ls=":")
        axis.set(title=title, xlabel="%", xlim=(-4, 104), yticks=[-row for row in range(len(methods))])
        axis.set_yticklabels(methods if axis is axes[0] else [""] * len(methods))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", lw=0.3)
    if len(next(iter(panels.values()))) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="lower left", fontsize=8, frameon=False)
    figure.tight_layout()
    with atomic_path(path) as part:
        figure.savefig(part, dpi=110, format="png")
    pyplot.close(figure)


def sheet(rows: Mapping[str, Path], path: Path) -> None:
    """Draw the first images of each picture in a row, after its name."""
    picture = Image.new("RGB", (LABEL + SHOWN * TILE * 2, len(rows) * TILE * 2), "white")
    pen = ImageDraw.Draw(picture)
    for number, (name, source) in enumerate(rows.items()):
        top = number * TILE * 2
        strip = Image.open(source).convert("RGB").crop((0, 0, SHOWN * TILE, TILE))
        picture.paste(strip.resize((SHOWN * TILE * 2, TILE * 2), Image.Resampling.NEAREST), (LABEL, top))
        pen.text((4, top + TILE - 6), name, fill="black")
    with atomic_path(path) as part:
        picture.quantize(128, dither=Image.Dither.NONE).save(part, "PNG", optimize=True)
