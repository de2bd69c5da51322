"""Runs of `lit-align test` on a few prompts and their results."""

import json

from lit_align.commands.evaluate import comparison
from lit_align.commands.evaluate.test import WinRateTest
from tests.support.paths import PIPELINE, ROOT

NAMES = ["anchor", "bacon", "fox", "tulip", "bell", "red apple", "axe", "cactus"]
SCORERS = ["clip", "style", "colour"]
TOLERANCES = {"clip": 0.01}


def write_prompts(folder, names=NAMES):
    """Write prompts into a text file and return its path."""
    path = folder / "prompts.txt"
    path.write_text("\n".join(names) + "\n")
    return str(path)


def run_test(folder, model, names=NAMES, output="out", **options):
    """Run a test on two CPU models with a cache in the folder, and return its results."""
    options = {
        "models": {"dark": model},
        "scorers": SCORERS,
        "base": str(PIPELINE),
        "presets": ROOT / "assets/emoji/scorers/scorers.yaml",
        "steps": 2,
        "cache": folder / "cache",
        "accelerator": "cpu",
        "devices": 1,
        **options,
    }
    WinRateTest(output=folder / output, prompts=write_prompts(folder, names), **options).run()
    return read_results(folder / output)


def read_results(folder):
    """Read the results of a test."""
    return json.loads((folder / "results.json").read_text())


def read_images(folder):
    """Read all pictures of a test, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("images/*/*.png"))}


def without_options(results):
    """Results without versions, device and options."""
    return {name: value for name, value in results.items() if name != "made_with"}


def counting(monkeypatch):
    """Return a list that gets the number of images of each call of `draw_images`."""
    counts, draw = [], comparison.draw_images

    def counted(model, wanted, *rest):
        counts.append(len(wanted))
        return draw(model, wanted, *rest)

    monkeypatch.setattr(comparison, "draw_images", counted)
    return counts
