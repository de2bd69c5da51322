"""Training runs of the accelerator's benchmark: shipped configs with few overrides, and a clock for their steps."""

import contextlib
import gc
import io
import json
import logging
import os
import re
import resource
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accelerator_record import Facts
from benchmarks.full_size import write_pipeline
from lit_align.cli import main as lit_align
from lit_align.data.shards.writer import NewPair, write_shard
from lit_align.training.steps import at_step

ROOT = Path(__file__).parents[1]
TOTAL = re.compile(r"^\s*total\s+([\d.,]+) (\w+) of", re.MULTILINE)  # in the doctor's report
CLOCK = f"{__name__}.Clock"
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@dataclass(frozen=True)
class Site:
    """Where a benchmark runs, and with what.

    Args:
        work: folder for pipelines, pairs and runs.
        device: `cuda` or `cpu`.
        toy: small networks and images, to rehearse.
        workers: processes of a training's loader.
        side: of all images in pixels; None, that of the published pipeline.
    """

    work: Path
    device: str
    toy: bool
    workers: int
    side: int | None = None

    @property
    def accelerator(self) -> str:
        """The device in the words of the commands."""
        return "gpu" if self.device == "cuda" else "cpu"

    @property
    def steps(self) -> tuple[int, int]:
        """Steps before the clock starts, and timed ones."""
        return (1, 1) if self.toy else (3, 20)

    def resolution(self, kind: str) -> int:
        """Side of the training images in pixels."""
        if self.side is not None:
            return self.side
        return (64 if self.toy else 1024) if kind == "sdxl" else (32 if self.toy else 512)

    def pipeline(self, kind: str) -> Path:
        """Write the pipeline of a kind, at its first use."""
        folder = self.work / kind
        if not folder.exists():
            write_pipeline(folder, kind, self.device, self.toy)
        return folder

    def pairs(self, kind: str) -> str:
        """Write pairs of a kind's resolution, at their first use, and return the name of their shard."""
        side = self.resolution(kind)
        shard = self.work / f"pairs-{side}/00000.tar"
        if not shard.exists():
            shard.parent.mkdir(parents=True, exist_ok=True)
            write_shard(shard, (pair(number, side) for number in range(self.count)))
        return str(shard)

    @property
    def count(self) -> int:
        """Pairs of a shard: enough that no epoch ends within the timed steps of up to 4 pairs."""
        return 8 if self.toy else 96


def pair(number: int, side: int) -> NewPair:
    """A pair of smooth random images, whose files are about as large as photographs'."""
    draw = np.random.default_rng(number)

    def image() -> bytes:
        coarse, buffer = draw.integers(0, 256, (max(side // 8, 2), max(side // 8, 2), 3), dtype=np.uint8), io.BytesIO()
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=92)
        return buffer.getvalue()

    return NewPair(f"{number:05d}", image(), image(), 1.0, f"a red fox number {number}, in the snow")


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
    """Write the overrides of a shipped config to a file, and return the words of a command line.

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
    path = site.work / "overrides.yaml"
    path.write_text(yaml.safe_dump(values))
    return [f"--config={ROOT / 'configs' / config}", f"--config={path}"]


def train(site: Site, kind: str, config: str, overrides: dict[str, Any]) -> Facts:
    """Train for some steps by `lit-align fit`, and return the speed, the memory, and the doctor's estimate of it."""
    path = site.work / "clock.json"
    path.unlink(missing_ok=True)
    line = words(site, kind, config, overrides, [callback(CLOCK, path=str(path), skip=site.steps[0])])
    run_quietly(["fit", *line])
    found: Facts = json.loads(path.read_text())
    if (expected := estimate(line)) is not None:
        found |= {"doctor's GB": expected / 1e9, "doctor/peak": expected / 1e9 / found["peak GB"]}
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


def estimate(line: list[str]) -> float | None:
    """Return the bytes that the doctor expects of a training; None where it fails or its report has none."""
    try:
        found = TOTAL.search(run_quietly(["doctor", *line]))
    except Exception:  # the training's own result must not be lost
        return None
    return None if found is None else float(found[1].replace(",", "")) * UNITS[found[2]]


def start_afresh() -> None:
    """Give back what a run has held, and what it has set. While its error is handled, its frames keep it alive."""
    torch.set_float32_matmul_precision("highest")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forward_flops(site: Site, kind: str) -> int:
    """Count the floating-point operations of the UNet's forward pass over one image, without memory or time."""
    config = UNet2DConditionModel.load_config(site.pipeline(kind), subfolder="unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        side, added = site.resolution(kind) // 8, {}
        if kind == "sdxl":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * 256
            added = {"text_embeds": torch.ones(1, pooled), "time_ids": torch.ones(1, 6)}
        tokens = torch.ones(1, 77, config["cross_attention_dim"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(torch.ones(1, 4, side, side), torch.ones(1), tokens, added_cond_kwargs=added)
    return counter.get_total_flops()


def matmul_rate(device: str, side: int, seconds: float = 1.0) -> float:
    """Measure the bfloat16 operations per second of a large matrix product."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    count, start = 0, _now(device)
    while _now(device) - start < seconds:
        for _ in range(10):
            left @ right
        count += 10
    return count * 2 * side**3 / (_now(device) - start)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
