"""Agreement of preference scorers with the human label and with each other."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_align.common.files import atomic_path
from lit_align.data.labels.score_files import read_scores, side_file, survey
from lit_align.data.read_options import ReadOptions
from lit_align.data.shards.layout import SampleError, parse_sample, read_samples
from lit_align.scoring.vote import Ballot, Vote
from lit_align.user_errors import MissingPackageError


class ScoredPairs(NamedTuple):
    """All pairs that have a score by every scorer."""

    human: Tensor  # (pairs,) int64: +1 where the human label prefers image 0, -1 where image 1, 0 for a tie
    scores: dict[str, Tensor]  # by scorer: (2, pairs) float64
    unscored: int  # pairs that lack a score


def report_agreement(shards: Sequence[str], folder: str | None, scorers: Sequence[str], options: ReadOptions) -> None:
    """Print the agreement, and save it as Markdown, JSON and a heat map beside the scores.

    Raises:
        ValueError: if shards were scored by different weights.
    """
    survey(shards, folder, scorers)
    found = measure(gather(shards, folder, scorers, options))
    table = to_markdown(found)
    print(f"\n{table}")
    place = Path(folder) if folder is not None else Path(shards[0]).parent
    (place / "agreement.md").write_text(table)
    (place / "agreement.json").write_text(json.dumps(found, indent=2) + "\n")
    draw_heat_map(found, place / "agreement.png")
    print(f"Saved as {place / 'agreement.md'}, agreement.json and agreement.png")


def gather(shards: Sequence[str], folder: str | None, scorers: Sequence[str], options: ReadOptions) -> ScoredPairs:
    """Labels from the shards and scores from their side files."""
    human: list[int] = []
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in scorers}
    unscored = 0
    for shard in shards:
        rows = {}
        for name, stored in read_scores(side_file(shard, folder)).items():
            both = list(zip(stored.score_0.tolist(), stored.score_1.tolist(), strict=True))
            rows[name] = {key: both[row] for key, row in stored.rows().items()}
        for sample in read_samples(shard, image_bytes=0):
            try:
                pair = parse_sample(sample)
            except SampleError as error:
                options.skip_or_raise(error)
                continue
            if any(pair.key not in rows.get(name, {}) for name in scorers):
                unscored += 1
                continue
            human.append(pair.human)
            for name in scorers:
                scores[name].append(rows[name][pair.key])
    tensors = {name: torch.tensor(values, dtype=torch.float64).view(-1, 2).T for name, values in scores.items()}
    return ScoredPairs(torch.tensor(human, dtype=torch.long), tensors, unscored)


def measure(pairs: ScoredPairs) -> dict[str, Any]:
    """Agreements and scales as plain values; an agreement is over pairs on which both sides decide."""
    names = list(pairs.scores)
    differences = {name: scores[0] - scores[1] for name, scores in pairs.scores.items()}
    verdict = Vote(names, ties="skip").decide(Ballot(differences, pairs.human))
    signs = {"human": pairs.human, **{name: value.sign() for name, value in differences.items()}}
    signs["consensus"] = verdict.sign
    votes = torch.stack([signs[name] for name in names], 1)
    agreed = (votes == votes[:, :1]).all(1) & (votes[:, 0] != 0)
    return {
        "pairs": len(pairs.human),
        "unscored": pairs.unscored,
        "human_ties": int((pairs.human == 0).sum()),
        "agreement": {a: {b: _agreement(signs[a], signs[b]) for b in signs} for a in signs},
        "consensus_ties": _share(verdict.sign == 0),
        "unanimous": _share(agreed),
        "unanimous_with_human": _share(agreed & (votes[:, 0] == pairs.human)),
        "scales": {name: _scale(scores, differences[name]) for name, scores in pairs.scores.items()},
    }


def _agreement(first: Tensor, second: Tensor) -> float | None:
    decided = (first != 0) & (second != 0)
    return _share((first == second)[decided])


def _share(where: Tensor) -> float | None:
    return where.double().mean().item() if len(where) else None


def _scale(scores: Tensor, difference: Tensor) -> dict[str, float | None]:
    if not scores.numel():
        return dict.fromkeys(("mean", "deviation", "least", "greatest", "median_difference", "ties"))
    return {
        "mean": scores.mean().item(),
        "deviation": scores.std(correction=0).item(),
        "least": scores.min().item(),
        "greatest": scores.max().item(),
        "median_difference": difference.abs().median().item(),
        "ties": _share(difference == 0),
    }


def to_markdown(found: dict[str, Any]) -> str:
    """The report for people."""
    names = list(found["agreement"])
    lines = [
        f"{found['pairs']:,} scored pairs, {found['human_ties']:,} of them human ties; "
        f"{found['unscored']:,} more lack a score. The majority of all scorers is tied on "
        f"{_percent(found['consensus_ties'])} of pairs; all scorers agree on {_percent(found['unanimous'])}, "
        f"and with the human label too on {_percent(found['unanimous_with_human'])}.",
        "",
        "| agreement | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for a in names:
        lines.append(f"| {a} | " + " | ".join(_percent(found["agreement"][a][b]) for b in names) + " |")
    lines += [
        "",
        "| scorer | mean | deviation | least | greatest | median difference in a pair | ties |",
        "|---" * 7 + "|",
    ]
    for name, scale in found["scales"].items():
        values = [scale[key] for key in ("mean", "deviation", "least", "greatest", "median_difference")]
        cells = ["-" if value is None else f"{value:.4g}" for value in values]
        lines.append(f"| {name} | " + " | ".join([*cells, _percent(scale["ties"])]) + " |")
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def require_matplotlib() -> None:
    """Raise a ModuleNotFoundError that names the remedy, before hours of scoring."""
    if find_spec("matplotlib") is None:
        raise MissingPackageError("--report needs matplotlib, lit-align's extra report: pip install matplotlib")


def draw_heat_map(found: dict[str, Any], path: Path) -> None:
    """The agreements as a picture: white is chance, blue agrees, red contradicts."""
    from matplotlib.figure import Figure  # late and without pyplot: optional, and no window

    names = list(found["agreement"])
    values = [[float("nan") if (v := found["agreement"][a][b]) is None else v for b in names] for a in names]
    size = 1.8 + 0.8 * len(names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="RdBu", vmin=0, vmax=1)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            shade = "white" if abs(value - 0.5) > 0.35 else "black"
            axes.text(column, row, "-" if value != value else f"{value:.0%}", ha="center", va="center", color=shade)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"Agreement on {found['pairs']:,} pairs")
    figure.colorbar(image, ax=axes, shrink=0.8, format=lambda share, _: f"{share:.0%}")
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=120)
