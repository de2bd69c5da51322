"""Training runs of the accelerator's benchmark: shipped configs with few overrides, and a clock for their steps."""

import contextlib
import gc
import io
import json
import logging
import os
import resource
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from benchmarks.accelerator_record import ROOT, Facts
from benchmarks.accelerator_site import Site
from lit_align.cli import main as lit_align
from lit_align.training.steps import at_step

CLOCK, FOUND = f"{__name__}.Clock", "clock.json"
CHECKPOINTING = "model.backbone.init_args.gradient_checkpointing"
BATCH, CACHE, PRECISION = "data.batch_size", "data.train_cache", "trainer.precision"
OBJECTIVE, OPTIMIZER = "model.objective", "model.optimizer"
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6, "weight_decay": 0.01}}
EIGHT_BIT = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 1e-6, "weight_decay": 0.01}}


class Clock(L.Callback):
    """Times the steps of a run after the first few, and writes what it found when the run ends.

    It waits for the device twice in a run, so that the steps between are as fast as without it.

    Args:
        path: JSON file.
        skip: steps before the clock starts.
        stop_at: step after which the process kills itself, to try a resume; 0 never.
    """

    def __init__(self, path: str, skip: int, stop_at: int = 0) -> None:
        self.path, self.skip, self.stop_at = path, skip, stop_at
        self.start = self.waited = 0.0
        self.pairs, self.first = 0, 0
        self.losses: list[torch.Tensor] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())
        if self.start:
            self.pairs += batch.pairs.size
        elif at_step(trainer) and trainer.global_step >= self.skip:
            self._settle()
            self.start, self.first = time.perf_counter(), trainer.global_step
            self.waited = getattr(trainer.train_dataloader, "waited", 0.0)
        if self.stop_at and trainer.global_step == self.stop_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle()
        seconds = time.perf_counter() - self.start
        waited = getattr(trainer.train_dataloader, "waited", 0.0) - self.waited
        cuda = torch.cuda.is_available() and trainer.strategy.root_device.type == "cuda"
        found = {
            "pairs/s": self.pairs / seconds,
            "ms a step": 1000 * seconds / max(trainer.global_step - self.first, 1),
            "data wait": min(waited / seconds, 1.0),
            "peak GB": (torch.cuda.max_memory_allocated() if cuda else _main_memory()) / 1e9,
            "losses": [loss.item() for loss in self.losses],
        }
        Path(self.path).write_text(json.dumps(found))

    def _settle(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _main_memory() -> int:
    """Return the peak main memory of this process in bytes, earlier runs included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def callback(class_path: str, **arguments: Any) -> dict[str, Any]:
    """Write a callback as a config does."""
    return {"class_path": class_path, "init_args": arguments}


def words(
    site: Site, kind: str, config: str, overrides: dict[str, Any], callbacks: Sequence[dict[str, Any]] = ()
) -> list[str]:
    """Write the overrides of a shipped config to a new file, and return the words of a command line.

    Args:
        site: of the benchmark.
        kind: of the pipeline.
        config: name of a file in `configs`.
        overrides: values by the names of their options.
        callbacks: in place of the config's.
    """
    trainer = {
        "accelerator": site.accelerator,
        "devices": 1,
        "max_steps": sum(site.steps),
        "accumulate_grad_batches": 1,
        "logger": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "val_check_interval": None,
        "check_val_every_n_epoch": 1,
        "callbacks": list(callbacks),
        "default_root_dir": str(site.work / "runs"),
    }
    data = {
        "train_shards": site.pairs(kind),
        "val_shards": None,
        "resolution": site.resolution(kind),
        "num_workers": site.workers,
        "flip_probability": 0.0,
    }
    backbone = {"repo": str(site.pipeline(kind)), "vae_repo": None}
    values: dict[str, Any] = {"trainer": trainer, "model": {"backbone": {"init_args": backbone}}, "data": data}
    if site.toy:
        values["model"]["backbone"]["init_args"]["vae_precision"] = "fp32"
        values["trainer"]["precision"] = "32-true"  # CPUs without bfloat16 units are slow with it
    for name, value in overrides.items():
        at = values
        *outer, last = name.split(".")
        for key in outer:
            at = at.setdefault(key, {})
        at[last] = value
    with tempfile.NamedTemporaryFile("w", prefix="overrides-", suffix=".yaml", dir=site.work, delete=False) as file:
        file.write(yaml.safe_dump(values))
    return [f"--config={ROOT / 'configs' / config}", f"--config={file.name}"]


def train_words(site: Site, kind: str, config: str, overrides: dict[str, Any]) -> list[str]:
    """Return the words of a training for `train`; the arguments are those of `words`."""
    return words(site, kind, config, overrides, [callback(CLOCK, path=str(site.work / FOUND), skip=site.steps[0])])


def train(site: Site, line: list[str]) -> Facts:
    """Train for some steps by `lit-align fit`, and return the speed, the memory and the losses."""
    path = site.work / FOUND
    path.unlink(missing_ok=True)
    run_quietly(["fit", *line])
    found: Facts = json.loads(path.read_text())
    return found


def run_quietly(line: list[str]) -> str:
    """Run a command in this process, without its output, which it returns; an exit code other than 0 is an error."""
    text = io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            lit_align(line)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"exit code {end.code}: {text.getvalue()[-1000:]}") from end
    finally:
        logging.disable(logging.NOTSET)
    return text.getvalue()


def start_afresh() -> None:
    """Give back what a run has held, and what it has set. While its error is handled, its frames keep it alive."""
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
