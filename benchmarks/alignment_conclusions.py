"""Results of the comparison of objectives: the record, its tables and its plots."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks import alignment_tables as tables
from benchmarks.alignment_studies import TOLERANCES, Study
from lit_align.common.files import write_text

Measurements = Mapping[str, Any]
HEAD = """\
# Preference objectives compared on the bundled emoji

Made by `make objectives_table`; settings, all learning rates and the values of each seed are in
[objectives.json](objectives.json). Means over three seeds and 72 held-out prompts, one image each; in brackets 95 %
intervals, for other seeds and other prompts. Differences with a star have the same sign with every seed.

- style share: images in high contrast, %
- wins: against the base's image from the same noise, ties one half, %
- accuracy: held-out pairs whose chosen error is the lower one, by the human label, %
- chosen error, rejected error: held-out, against the base's
- diversity: mean distance of CLIP's embeddings of two images, over the base's
- pairs: that the method's order leaves to train on
- rate: learning rate
"""


class Aligned(NamedTuple):
    """Results of a method on a base, at the chosen learning rate."""

    rate: float
    worths: dict[str, float]  # on training prompts, by learning rate
    seeds: list[Measurements]  # on held-out prompts
    pairs: int  # of the training
    picture: Path  # of the first seed's images


class Findings(NamedTuple):
    """All measurements of a study, by base."""

    bases: dict[str, Measurements]
    pictures: dict[str, Path]  # of the bases' images
    aligned: dict[str, dict[str, Aligned]]  # by base, by method


def values_of(findings: Findings, base: str, method: str) -> dict[str, Tensor]:
    """Values (seeds, prompts) by measure."""
    return tables.by_seed_and_prompt(findings.aligned[base][method].seeds, findings.bases[base], TOLERANCES)


def summarise(study: Study, findings: Findings) -> dict[str, Any]:
    """Summarise a study in plain values: mismatch by base; rate, estimates with intervals and errors by method."""
    found: dict[str, Any] = {}
    for base, before in findings.bases.items():
        methods = {}
        for name, aligned in findings.aligned[base].items():
            values = values_of(findings, base, name)
            estimates = {key: tables.estimate(value) for key, value in values.items()}
            methods[name] = {
                "title": study.methods[name].title,
                "rate": aligned.rate,
                "worth_by_rate": aligned.worths,
                **estimates,
                "by_seed": {key: value.mean(1).tolist() for key, value in values.items()},
                "errors": tables.about_errors(aligned.seeds, before),
                "pairs": aligned.pairs,
            }
        style = sum(before["in_style"]) / len(before["in_style"])
        found[base] = {"mismatch": tables.mismatch(before), "style": style, "methods": methods}
    return found


def differences(study: Study, findings: Findings) -> dict[str, dict[str, Any]]:
    """Answer the questions of a study, each by the difference of two methods per seed and prompt.

    By measure: mean and 95 % interval, as `estimate`; the mean of each seed, as `by_seed`.
    """
    found = {}
    if "mapo" in study.methods:
        gains = {}
        for base in study.bases:
            for name in ("mapo", "paper_mapo", "balanced", "sft"):
                gains[base, name] = _difference(findings, (base, name), (base, "dpo"))
                found[f"{name} minus dpo, {base}"] = gains[base, name]
        small, large = study.bases
        for name in ("mapo", "paper_mapo"):
            change = {key: gains[large, name][key] - gains[small, name][key] for key in gains[large, name]}
            found[f"{name} minus dpo, {large} minus {small}"] = change
            found[f"{name} minus sft, {large}"] = _difference(findings, (large, name), (large, "sft"))
    else:
        (base,) = study.bases
        for name in study.methods:
            if name != "static":
                found[f"static minus {name}"] = _difference(findings, (base, "static"), (base, name))
        found["moving minus static"] = _difference(findings, (base, "moving"), (base, "static"))
    return {
        question: {
            measure: {"estimate": tables.estimate(value), "by_seed": value.mean(1).tolist()}
            for measure, value in values.items()
        }
        for question, values in found.items()
    }


def _difference(findings: Findings, first: tuple[str, str], second: tuple[str, str]) -> dict[str, Tensor]:
    mine, other = (values_of(findings, *which) for which in (first, second))
    return {key: mine[key] - other[key] for key in mine}


def record(
    studies: Mapping[str, tuple[Study, Findings]], settings: dict[str, Any], costs: Measurements, path: Path
) -> str:
    """Write a JSON file, with Markdown and pictures beside it, and return the Markdown."""
    text, found = [HEAD], {"settings": settings, "costs": costs, "studies": {}, "differences": {}}
    for name, (study, findings) in studies.items():
        summary = summarise(study, findings)
        found["studies"][name] = summary
        found["differences"][name] = differences(study, findings)
        text += [_tables(study, summary), _questions(found["differences"][name], study)]
        _draw(name, study, findings, summary, path)
    text.append(_costs(costs))
    write_text(path, json.dumps(found, indent=1) + "\n")
    write_text(path.with_suffix(".md"), "\n".join(text))
    return "\n".join(text)


def _tables(study: Study, summary: Mapping[str, Any]) -> str:
    parts = []
    for base, of_base in summary.items():
        rows = {values["title"]: values for values in of_base["methods"].values()}
        title = f"Base `{base}`: errors on chosen over rejected {of_base['mismatch']:.2f}"
        title += f", {of_base['style']:.0%} of its images in the preferred style" if study.style_counts else ""
        parts.append(tables.markdown(title, rows, study.scorers, study.style_counts))
    return "\n".join(parts)


def _questions(found: Mapping[str, Mapping[str, Any]], study: Study) -> str:
    keys = (["style"] if study.style_counts else []) + list(study.scorers) + ["macro"] * (not study.style_counts)
    lines = [f"| differences in points | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for question, values in found.items():
        lines.append(f"| {question} | {' | '.join(_difference_cell(values[key]) for key in keys)} |")
    return "\n".join(lines) + "\n"


def _difference_cell(value: Mapping[str, Any]) -> str:
    signs = {seed > 0 for seed in value["by_seed"]}
    return tables.percent(value["estimate"]) + ("*" if len(signs) == 1 and 0 not in value["by_seed"] else "")


def _costs(costs: Measurements) -> str:
    lines = ["| | seconds a step | memory above the start, MB |", "|---|---|---|"]
    lines += [f"| {title} | {cost['step_seconds']:.2f} | {cost['megabytes']:.0f} |" for title, cost in costs.items()]
    return "\n".join(lines) + "\n"


def _draw(name: str, study: Study, findings: Findings, summary: Mapping[str, Any], path: Path) -> None:
    keys: dict[str, str] = {"style share": "style"} if study.style_counts else {}
    keys |= {f"wins, {scorer}": scorer for scorer in study.scorers}
    keys |= {} if study.style_counts else {"wins, macro": "macro"}
    groups: Callable[[str], dict[str, Any]] = lambda key: {  # noqa: E731
        f"{base}, mismatch {of_base['mismatch']:.1f}": {
            values["title"]: values[key] for values in of_base["methods"].values()
        }
        for base, of_base in summary.items()
    }
    tables.plot({title: groups(key) for title, key in keys.items()}, path.with_name(f"{path.stem}_{name}.png"))
    rows = {}
    for base in study.bases:
        rows[f"base: {base}"] = findings.pictures[base]
        for method, aligned in findings.aligned[base].items():
            rows[f"{study.methods[method].title}{' ' * len(rows)}"] = aligned.picture  # a name for each row
    tables.sheet(rows, path.with_name(f"{path.stem}_{name}_images.png"))
