"""Train beside the released scripts: CPU seconds a step and peak memory, same pipeline, pairs, batch and precision.

python benchmarks/peers.py --out DIR [--peer DIR ...] [--peer-python PYTHON] [--work DIR] [--minutes 20]
python benchmarks/peers.py --out DIR --toy          all of it at toy size

A peer is a checkout, or a folder that holds checkouts, of mapo-t2i/mapo (train.py) and of huggingface/diffusers
(examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py). Their files run as they are, by PYTHON, whose
environment must have what they import (datasets, torchvision, wandb) beside lit-align's. Without --peer, lit-align and
the bare loop are measured alone.

Each training is a process with one thread, and no network; Linux counts its CPU seconds. The pipeline has SDXL's
layout and random weights, made on the spot, and is reduced to fit 20 minutes and 6 GB of memory: `UNET`, `LAYERS` and
`SIDE` say how far; the VAE has its full size.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))  # finds `benchmarks`

from benchmarks.accelerator import ADAMW, BATCH, CACHE, CHECKPOINTING, PRECISION, about
from benchmarks.accelerator_record import Facts, Record
from benchmarks.accelerator_runs import ROOT, Site, callback, pair, words
from benchmarks.full_size import write_pipeline
from benchmarks.peers_marks import watch
from lit_align.data.shards.writer import write_shard

UNET = {
    "block_out_channels": (128, 256, 512),
    "attention_head_dim": (2, 4, 8),
    "transformer_layers_per_block": (1, 1, 1),
}
LAYERS = (12, 8)  # of the text encoders; the second one's are 32 in SDXL
SIDE, TOY_SIDE = 96, 64  # pixels
PAIRS, STEPS = 2, 3  # pairs a step; steps of a run, the first of which is not counted
MAPO = "train.py"
DPO = "examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py"
BARE = "bare UNet loop"
QUIET: dict[str, Any] = {"capture_output": True, "text": True}


class Run(NamedTuple):
    """A training to measure."""

    name: str
    command: list[str]
    folder: Path = ROOT  # in which it runs
    seconds: float = 60.0  # that it takes at least


class Comparison:
    """The trainings on one pipeline and one set of pairs.

    Args:
        work: folder for all that is made.
        toy: small networks and images.
        peers: folders that --peer names.
        python: that runs the peers' files.
        record: of the results.
    """

    def __init__(self, work: Path, toy: bool, peers: list[Path], python: str, record: Record) -> None:
        self.work, self.toy, self.python, self.record = work, toy, python, record
        self.side = TOY_SIDE if toy else SIDE
        self.site = Site(work, "cpu", toy, 0, self.side)
        self.mapo, self.dpo = find(peers, MAPO), find(peers, DPO)
        self.bare: list[float] = []  # CPU seconds a step
        self.pipeline, self.pairs = work / "sdxl", work / "pairs"

    def prepare(self) -> Facts:
        """Write the pipeline, and the pairs as a shard and as the table that the peers read."""
        reduced: dict[str, Any] = {} if self.toy else {"unet": UNET, "layers": LAYERS}
        count = write_pipeline(self.pipeline, "sdxl", toy=self.toy, **reduced)
        pairs = [pair(number, self.side) for number in range(PAIRS * STEPS)]
        shard = self.work / f"pairs-{self.side}/00000.tar"
        shard.parent.mkdir()
        write_shard(shard, pairs)
        self.pairs.mkdir()
        columns = {
            "jpg_0": [pair.image_0 for pair in pairs],
            "jpg_1": [pair.image_1 for pair in pairs],
            "label_0": [pair.label_0 for pair in pairs],
            "label_1": [1 - pair.label_0 for pair in pairs],
            "caption": [pair.prompt for pair in pairs],
        }
        pq.write_table(pa.table(columns), self.pairs / "train-00000-of-00001.parquet")
        return {"UNet's parameters": f"{count:,}", "pixels": f"{self.side} x {self.side}", "pairs a step": PAIRS}

    def encode(self) -> Facts:
        """Cache the pairs by `lit-align encode`; the cost is that of a cache, once for all runs on it."""
        line = words(self.site, "sdxl", "mapo_sdxl.yaml", options(None, lora=False))
        command = [*_lit_align("encode"), *line, f"--output={self.work / 'cache'}", "--accelerator=cpu"]
        before = _children_seconds()
        subprocess.run(command, cwd=ROOT, env=self._environment(), check=True, timeout=self.record.left(), **QUIET)
        count = PAIRS * STEPS
        return {"CPU s a pair, with the start": (_children_seconds() - before) / count, "pairs": count}

    def runs(self) -> Iterator[Run]:
        """All trainings; those that are compared stand side by side, and the bare loop comes first and last."""
        bare = [sys.executable, str(ROOT / "benchmarks/peers_bare.py"), str(self.pipeline), f"--side={self.side}"]
        bare += [f"--pairs={PAIRS}", f"--steps={STEPS}"]
        yield Run(BARE, bare)
        if self.mapo:
            yield self._released("released MaPO, train.py", self.mapo, [])
        yield self._ours("lit-align MaPO, on the fly", "mapo_sdxl.yaml", lora=False, cached=False)
        yield self._ours("lit-align MaPO, cached", "mapo_sdxl.yaml", lora=False, cached=True)
        if self.dpo:
            yield self._released("diffusers DPO LoRA, train_diffusion_dpo_sdxl.py", self.dpo, ["--rank=8"])
        yield self._ours("lit-align DiffusionDPO LoRA, on the fly", "mapo_sdxl_lora.yaml", lora=True, cached=False)
        yield self._ours("lit-align DiffusionDPO LoRA, cached", "mapo_sdxl_lora.yaml", lora=True, cached=True)
        yield Run(f"{BARE}, again", bare)

    def measure(self, run: Run) -> Facts:
        """Measure a training, and divide it by the bare loop's mean so far."""
        log, left = self.work / "log.txt", self.record.left()
        facts = watch(run.command, STEPS, log, run.folder, self._environment(), left)
        if run.name.startswith(BARE):
            self.bare.append(facts["CPU s a step"])
        if self.bare:
            facts["times the bare loop"] = facts["CPU s a step"] / (sum(self.bare) / len(self.bare))
        return facts

    def _ours(self, name: str, config: str, lora: bool, cached: bool) -> Run:
        """A training by `lit-align fit`, with its own file of overrides."""
        values = options(str(self.work / "cache") if cached else None, lora)
        line = words(self.site, "sdxl", config, values, [callback("benchmarks.peers_marks.StepMarks")])
        own = self.work / f"{name}.yaml"
        Path(line[-1].removeprefix("--config=")).rename(own)
        return Run(name, [*_lit_align("fit"), line[0], f"--config={own}"])

    def _released(self, name: str, script: Path, more: list[str]) -> Run:
        """A training by a peer's script, by its own options alone."""
        values: dict[str, Any] = {
            "pretrained_model_name_or_path": self.pipeline,
            "dataset_name": self.pairs,
            "dataset_split_name": "train",
            "cache_dir": self.work / "peers-cache",
            "output_dir": self.work / "peers-output",
            "resolution": self.side,
            "train_batch_size": PAIRS,
            "max_train_steps": STEPS,
            "learning_rate": 1e-6,
            "lr_scheduler": "constant",
            "mixed_precision": "no",
            "seed": 1,
        }
        line = [f"--{key}={value}" for key, value in values.items()]
        return Run(
            name, [self.python, script.name, *line, "--gradient_checkpointing", "--no_hflip", *more], script.parent
        )

    def _environment(self) -> dict[str, str]:
        """One thread, no network, and no files in the peers' checkouts."""
        own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        own |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.work / "datasets"), "WANDB_MODE": "disabled"}
        return {**os.environ, **own, "CUDA_VISIBLE_DEVICES": ""}


def options(cache: str | None, lora: bool) -> dict[str, Any]:
    """What lit-align's configs are overridden with, so that they ask for what the released scripts do.

    Args:
        cache: folder of encoded pairs; None encodes on the fly.
        lora: whether to train a LoRA by DiffusionDPO, as diffusers' script does; else all weights by MaPO.
    """
    values: dict[str, Any] = {
        BATCH: PAIRS,
        CACHE: cache,
        CHECKPOINTING: True,
        PRECISION: "32-true",
        "model.backbone.init_args.vae_precision": "fp32",
        "model.backbone.init_args.vae_slicing": False,
        "model.optimizer": ADAMW,
        "trainer.max_steps": STEPS,
        "trainer.enable_progress_bar": False,
    }
    if lora:
        values["model.objective"] = {"class_path": "lit_align.objectives.DiffusionDPO"}
    return values


def find(peers: list[Path], script: str) -> Path | None:
    """Find a peer's script in the folders, or in the folders in them."""
    for folder in peers:
        for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
            if (place / script).is_file() and (script != MAPO or (place / "args.py").is_file()):
                return (place / script).resolve()
    return None


def _lit_align(command: str) -> list[str]:
    return [sys.executable, "-m", "lit_align", command]


def _children_seconds() -> float:
    """CPU seconds of the processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure all trainings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--work", type=Path, help="folder for what is made, 5 GB, not there yet; none: a temporary one")
    parser.add_argument("--peer", type=Path, action="append", default=[], help="checkout, or a folder that holds some")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers' scripts")
    parser.add_argument("--minutes", type=float, default=20.0, help="for everything")
    parser.add_argument("--toy", action="store_true", help="small networks and images, to rehearse")
    arguments = parser.parse_args()
    if missing := [str(folder) for folder in arguments.peer if not folder.is_dir()]:
        parser.error(f"--peer: {', '.join(missing)} is no folder")
    python = shutil.which(arguments.peer_python)
    if python is None:
        parser.error(f"--peer-python: {arguments.peer_python} is no program")
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="lit-align-peers-")) / "work").resolve()
    work.mkdir(parents=True)
    try:
        record = Record(arguments.out, about("cpu"), 60 * arguments.minutes)
        comparison = Comparison(work, arguments.toy, arguments.peer, os.path.abspath(python), record)
        if record.measure("made", "pipeline and pairs", comparison.prepare) is None:
            sys.exit("The pipeline and the pairs could not be made.")
        record.measure("made", "cache", comparison.encode)
        for run in comparison.runs():
            record.measure("trainings", run.name, partial(comparison.measure, run), run.seconds)
        if failed := [row["name"] for row in record.rows if "failed" in row]:
            sys.exit(f"{len(failed)} of {len(record.rows)} measurements failed: {', '.join(failed)}")
    finally:
        if arguments.work is None:
            shutil.rmtree(work.parent, ignore_errors=True)


if __name__ == "__main__":
    main()
