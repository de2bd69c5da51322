"""Output of `lit-align test`: pictures, results and report in files, tables on the terminal."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_align.common.files import atomic_path, write_text

if TYPE_CHECKING:
    from lit_align.commands.evaluate.comparison import DrawnModel

BASE = "base"  # name of the model that the others are compared with


def stamp(path: Path) -> tuple[int, int] | None:
    """Value that changes whenever a file is written; None where there is no file."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.is_file() else None


def publish(path: Path, results: dict[str, Any], models: "Mapping[str, DrawnModel]") -> None:
    """Write pictures, results and report, and print the tables.

    Args:
        path: of results.json.
        results: its contents.
        models: by name.
    """
    from lit_align.evaluation.report.page import write_report  # here: imports torch
    from lit_align.evaluation.tables import overview, to_text

    for name, model in models.items():
        for number, image in enumerate(model.images.paths):
            _link(image, path.parent / "images" / name / f"{number:05d}.png")
    write_text(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    for name, model in models.items():
        if name != BASE and model.fingerprint == models[BASE].fingerprint:
            print(f"{name} is {BASE}, weight for weight: every prompt is a tie")
    for comparison in results["comparisons"]:
        print(f"\n{to_text(comparison, len(results['prompts']))}")
    if table := overview(results["comparisons"], BASE):
        print(f"\n{table}")
    tied = ", ".join(f"{name} {scorer['tie_tolerance']:g}" for name, scorer in results["scorers"].items())
    print(f"\nA win is a higher score; a tie, which counts one half, a difference of at most: {tied}")
    print(f"Results: {path}")
    print(f"Report: {write_report(path.parent)}")


def _link(image: Path, path: Path) -> None:
    """Hard-link an image under another name, or copy it to another disk."""
    if path.exists() and path.samefile(image):
        return
    with atomic_path(path) as part:
        try:
            part.hardlink_to(image)
        except OSError:
            shutil.copyfile(image, part)
