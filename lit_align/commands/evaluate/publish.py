"""What `lit-align test` leaves: pictures, results, the report; and the tables on the terminal."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_align.common.files import atomic_path, write_text
from lit_align.evaluation.image_store import Gallery
from lit_align.evaluation.report.page import write_report
from lit_align.evaluation.tables import overview, to_text

BASE = "base"  # what models are compared with


def stamp(path: Path) -> tuple[int, int] | None:
    """Changes with every writing of a file; None where there is none."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.is_file() else None


def publish(path: Path, results: dict[str, Any], galleries: Mapping[str, Gallery]) -> None:
    """Write pictures and results, and print the tables."""
    for name, gallery in galleries.items():
        for number, image in enumerate(gallery.paths):
            _link(image, path.parent / "images" / name / f"{number:05d}.png")
    write_text(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    for name, model in results["models"].items():
        if name != BASE and model["fingerprint"] == results["models"][BASE]["fingerprint"]:
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
    """The same file under another name, or a copy where that is on another disk."""
    if path.exists() and path.samefile(image):
        return
    with atomic_path(path) as part:
        try:
            part.hardlink_to(image)
        except OSError:
            shutil.copyfile(image, part)
