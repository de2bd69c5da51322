"""The record of a benchmark: each result is on the disk as soon as it is there, as JSON and as a table."""

import datetime
import json
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lit_align.common.files import write_text

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "bitsandbytes")
Facts = dict[str, Any]  # of one measurement: numbers and short strings


class Record:
    """Runs measurements one after the other, within a time, and writes what each has found.

    A measurement that fails, or for which no time is left, is recorded as such, and the next one follows.

    Args:
        folder: for `results.json` and `results.md`.
        about: facts about the machine and the checkout.
        seconds: for all measurements.
        before: called before each measurement, when the error of the one before it holds nothing any more.
    """

    def __init__(
        self, folder: Path, about: Mapping[str, Any], seconds: float, before: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.about, self.before = folder, dict(about), before
        self.ends = time.monotonic() + seconds
        self.rows: list[Facts] = []
        self._longest: dict[str, float] = {}  # seconds of a measurement, by stage
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def measure(self, stage: str, name: str, run: Callable[[], Facts], seconds: float = 15.0) -> Facts | None:
        """Run a measurement and record its facts; returns None where it failed or was skipped.

        Args:
            stage: title of the table that it belongs to.
            name: of its row.
            run: measures.
            seconds: that it takes at least, where none of its stage has run yet.
        """
        left = self.ends - time.monotonic()
        if left < self._longest.get(stage, seconds):
            self._add(stage, name, {"skipped": f"{max(left, 0):.0f} s were left"})
            return None
        self.before()
        start = time.monotonic()
        try:
            facts = run()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a SystemExit too: the front door ends so
            text = "".join(traceback.format_exception(error))
            with (self.folder / "errors.txt").open("a") as file:
                file.write(f"== {stage}: {name}\n{text}\n")
            self._add(stage, name, {"failed": f"{type(error).__name__}: {str(error)[-300:]}"})
            return None
        finally:
            taken = time.monotonic() - start
            self._longest[stage] = max(self._longest.get(stage, 0.0), taken)
        self._add(stage, name, {**facts, "seconds": round(taken, 1)})
        return facts

    def pass_over(self, stage: str, name: str, why: str) -> None:
        """Record that a measurement is not made, for another reason than time."""
        self._add(stage, name, {"passed over": why})

    def row(self, stage: str, name: str) -> Facts:
        """Return the last row of this name."""
        return next(row for row in reversed(self.rows) if (row["stage"], row["name"]) == (stage, name))

    def add(self, stage: str, name: str, facts: Facts) -> None:
        """Add facts to a row."""
        self.row(stage, name).update(facts)
        self._write()

    def left(self) -> float:
        """Seconds that are left, at least one."""
        return max(self.ends - time.monotonic(), 1.0)

    def _add(self, stage: str, name: str, facts: Facts) -> None:
        self.rows.append({"stage": stage, "name": name, **facts})
        self._write()
        told = ", ".join(f"{key} {_short(value)}" for key, value in facts.items() if not isinstance(value, list))
        print(f"[{max(self.ends - time.monotonic(), 0):4.0f} s left] {stage}: {name}: {told}", flush=True)

    def _write(self) -> None:
        whole = {"about": self.about, "results": self.rows}
        write_text(self.folder / "results.json", json.dumps(whole, indent=1) + "\n")
        write_text(self.folder / "results.md", self.table())

    def table(self) -> str:
        """Format all results as Markdown, one table a stage; lists of numbers stand in the JSON alone."""
        lines = [f"- {name}: {value}" for name, value in self.about.items()]
        for stage in dict.fromkeys(row["stage"] for row in self.rows):
            rows = [row for row in self.rows if row["stage"] == stage]
            keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("stage", "name")]
            keys = [key for key in keys if not any(isinstance(row.get(key), list) for row in rows)]
            lines += ["", f"## {stage}", "", f"| run | {' | '.join(keys)} |", f"|---|{'---|' * len(keys)}"]
            lines += [f"| {row['name']} | {' | '.join(_short(row.get(key, '')) for key in keys)} |" for row in rows]
        return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


def about(device: str) -> dict[str, Any]:
    """Return the facts about the machine and the checkout that a record begins with."""
    revision = ""  # a copy of a checkout may have no history, and a machine no git
    if git := shutil.which("git"):
        describe = [git, "describe", "--always", "--dirty"]
        revision = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except ModuleNotFoundError:
            installed[name] = "not installed"
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "checkout": revision or "unknown",
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}",
        "packages": ", ".join(f"{name} {number}" for name, number in installed.items()),
    }
