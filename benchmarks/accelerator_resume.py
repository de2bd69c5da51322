"""A training that is killed and resumed, beside the unbroken one."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.accelerator_record import ROOT, Facts
from benchmarks.accelerator_runs import BATCH, CACHE, CHECKPOINTING, CLOCK, callback, run_quietly, start_afresh, words
from benchmarks.accelerator_site import Site

STEPS, KILLED_AT = 3, 2  # each step is saved, but for the one that is killed before its save
RECORD = "resume.json"  # of the last run that ended


def resume(site: Site, cache: str | None, left: Callable[[], float]) -> Facts:
    """Kill a training in its second step, resume it, and compare its end with the unbroken one's.

    Each has a process of its own; in a rehearsal the killed one alone, because imports take most of the time.
    """
    folder = site.work / "resume"
    for name, stop_at in (("unbroken", 0), ("killed", KILLED_AT), ("killed", 0)):
        line = ["fit", *_words(site, cache, folder / name, stop_at), "--ckpt_path=last"]
        if site.toy and not stop_at:
            start_afresh()
            run_quietly(line)
        else:
            _run_alone(line, name, -signal.SIGKILL if stop_at else 0, left())
    whole, resumed = (_weights(folder / name / f"step={STEPS}.ckpt") for name in ("unbroken", "killed"))
    differences = [(whole[name].float() - resumed[name].float()).abs().max().item() for name in whole]
    resumed_after = STEPS - len(json.loads((site.work / RECORD).read_text())["losses"])
    return {"weights": len(whole), "largest difference": max(differences), "resumed after step": resumed_after}


def _words(site: Site, cache: str | None, folder: Path, stop_at: int) -> list[str]:
    options: dict[str, Any] = {BATCH: 1, CHECKPOINTING: True, CACHE: cache, "trainer.max_steps": STEPS}
    options |= {"trainer.enable_checkpointing": True, "trainer.default_root_dir": str(folder)}
    kept = {"dirpath": str(folder), "every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    callbacks = [
        callback(CLOCK, path=str(site.work / RECORD), skip=1, stop_at=stop_at),
        callback("lightning.pytorch.callbacks.ModelCheckpoint", **kept, save_last="link"),
    ]
    return words(site, "sdxl", "mapo_sdxl_lora.yaml", options | {"trainer.deterministic": True}, callbacks)


def _run_alone(line: list[str], name: str, code: int, seconds: float) -> None:
    """Run a command in a process of its own, which must end with this exit code."""
    command = [sys.executable, "-m", "lit_align", *line]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    if done.returncode != code:
        raise RuntimeError(f"{name}: exit code {done.returncode}: {done.stderr[-1000:]}")


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    return state
