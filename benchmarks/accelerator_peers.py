"""The released scripts on the device, and beside each lit-align with the same pipeline, pairs, batch and precision."""

import json
import subprocess
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.accelerator_record import ROOT, Facts, Record
from benchmarks.accelerator_runs import EIGHT_BIT, OPTIMIZER, train, train_words
from benchmarks.accelerator_site import Site
from benchmarks.peers_scripts import DPO, MAPO, VAE, Setting, find, offline

PAIRS = 2  # a step
STAGE = f"beside the released scripts, SDXL, {PAIRS} pairs, activations recomputed"
START = ROOT / "benchmarks/peers_device.py"


class Training(NamedTuple):
    """A training by a released script, and by lit-align."""

    name: str
    script: str  # a key of `find`
    options: tuple[str, ...]  # of the script, beside those of `Setting`
    config: str
    lora: bool


TRAININGS = (
    Training("MaPO, all weights, 8-bit AdamW", MAPO, ("--use_8bit_adam",), "mapo_sdxl.yaml", lora=False),
    Training("DiffusionDPO, LoRA", DPO, ("--rank=8",), "mapo_sdxl_lora.yaml", lora=True),
)


class Peers:
    """The trainings beside the released scripts, which `--peer` names.

    Each script runs by its own options in one process on one device, which is what `accelerate launch` with
    `--num_processes=1` starts. Its mixed precision is an option of its own.

    Args:
        folders: checkouts, or folders that hold some; none: all is passed over.
        python: interpreter of the scripts.
        site: where all run.
        record: of the results.
    """

    def __init__(self, folders: list[Path], python: str, site: Site, record: Record) -> None:
        self.folders, self.python, self.site, self.record = folders, python, site, record

    def measure(self, cache: str | None) -> None:
        """Record each script, then, if it ran, lit-align with the ratios to it.

        Args:
            cache: folder of SDXL's encoded pairs; None: lit-align runs on the fly alone.
        """
        if not self.folders:
            self.record.pass_over(STAGE, "all", "--peer names no checkouts")
            return
        for training in TRAININGS:
            script = find(self.folders, training.script)
            if script is None:
                self.record.pass_over(STAGE, training.name, f"--peer has no {training.script}")
                continue
            run = partial(self._released, training, script)
            theirs = self.record.measure(STAGE, f"{training.name}: released {script.name}", run, 90)
            if theirs is None:
                continue  # nothing to compare with
            for name, source in (("on the fly", None), ("cached", cache)):
                if source or name == "on the fly":
                    run = partial(self._ours, training, source, theirs)
                    self.record.measure(STAGE, f"{training.name}: lit-align, {name}", run)

    def _released(self, training: Training, script: Path) -> Facts:
        """Run a script until its steps are timed."""
        setting, facts = self._setting(), self.site.work / "peer.json"
        setting.write_table(self.site.pairs("sdxl"))
        facts.unlink(missing_ok=True)
        line = [self.python, START, facts, f"--skip={self.site.steps[0]}", f"--steps={setting.steps}"]
        line += [f"--pairs={PAIRS}", *setting.released(script, *training.options)]
        log, left = self.site.work / "peer.txt", self.record.left()
        with log.open("wb") as file:
            done = subprocess.run(
                line, cwd=script.parent, env=offline(self.site.work), stdout=file, stderr=file, timeout=left
            )
        if done.returncode or not facts.exists():
            said = log.read_text(errors="replace")[-1500:]
            raise RuntimeError(f"{script.name}: exit code {done.returncode}: {said}")
        found: Facts = json.loads(facts.read_text())
        return found

    def _ours(self, training: Training, cache: str | None, theirs: Facts) -> Facts:
        """Train by lit-align; `theirs` is what was found of the script."""
        options = self._setting().ours(cache, training.lora)
        if cache is None:
            options |= VAE
        if not training.lora:
            options[OPTIMIZER] = EIGHT_BIT
        facts = train(self.site, train_words(self.site, "sdxl", training.config, options))
        return facts | {f"{key}, times the script's": facts[key] / theirs[key] for key in ("pairs/s", "peak GB")}

    def _setting(self) -> Setting:
        site, precision = self.site, "32-true" if self.site.toy else "bf16-mixed"
        steps = sum(site.steps)
        return Setting(site.pipeline("sdxl"), site.work, site.resolution("sdxl"), PAIRS, steps, precision, site.workers)
