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
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # finds `benchmarks`

from benchmarks.accelerator_record import ROOT, Facts, Record, about
from benchmarks.accelerator_runs import ADAMW, OPTIMIZER, callback, words
from benchmarks.accelerator_site import Site, pair
from benchmarks.full_size import write_pipeline
from benchmarks.peers_marks import watch
from benchmarks.peers_scripts import DPO, MAPO, VAE, Setting, add_peer_options, check_peer_options, find, offline
from lit_align.data.shards.writer import write_shard

UNET = {
    "block_out_channels": (128, 256, 512),
    "attention_head_dim": (2, 4, 8),
    "transformer_layers_per_block": (1, 1, 1),
}
LAYERS = (12, 8)  # of the text encoders; the second one's are 32 in SDXL
SIDE, TOY_SIDE = 96, 64  # pixels
PAIRS, STEPS = 2, 3  # pairs a step; steps of a run, the first of which is not counted
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
        self.setting = Setting(work / "sdxl", work, self.side, PAIRS, STEPS, "32-true")

    def prepare(self) -> Facts:
        """Write the pipeline, and the pairs as a shard and as the table that the peers read."""
        reduced: dict[str, Any] = {} if self.toy else {"unet": UNET, "layers": LAYERS}
        count = write_pipeline(self.setting.pipeline, "sdxl", toy=self.toy, **reduced)
        shard = self.work / f"pairs-{self.side}/00000.tar"
        shard.parent.mkdir()
        write_shard(shard, (pair(number, self.side) for number in range(PAIRS * STEPS)))
        self.setting.write_table(str(shard))
        return {"UNet's parameters": f"{count:,}", "pixels": f"{self.side} x {self.side}", "pairs a step": PAIRS}

    def encode(self) -> Facts:
        """Cache the pairs by `lit-align encode`; the cost is that of a cache, once for all runs on it."""
        line = words(self.site, "sdxl", "mapo_sdxl.yaml", self._options(None, lora=False))
        command = [*_lit_align("encode"), *line, f"--output={self.work / 'cache'}", "--accelerator=cpu"]
        before = _children_seconds()
        subprocess.run(command, cwd=ROOT, env=self._environment(), check=True, timeout=self.record.left(), **QUIET)
        count = PAIRS * STEPS
        return {"CPU s a pair, with the start": (_children_seconds() - before) / count, "pairs": count}

    def runs(self) -> Iterator[Run]:
        """All trainings; those that are compared stand side by side, and the bare loop comes first and last."""
        bare = [
            sys.executable,
            str(ROOT / "benchmarks/peers_bare.py"),
            str(self.setting.pipeline),
            f"--side={self.side}",
        ]
        bare += [f"--pairs={PAIRS}", f"--steps={STEPS}"]
        yield Run(BARE, bare)
        if self.mapo:
            yield self._released("released MaPO, train.py", self.mapo)
        yield self._ours("lit-align MaPO, on the fly", "mapo_sdxl.yaml", lora=False, cached=False)
        yield self._ours("lit-align MaPO, cached", "mapo_sdxl.yaml", lora=False, cached=True)
        if self.dpo:
            yield self._released("diffusers DPO LoRA, train_diffusion_dpo_sdxl.py", self.dpo, "--rank=8")
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
        values = self._options(str(self.work / "cache") if cached else None, lora)
        line = words(self.site, "sdxl", config, values, [callback("benchmarks.peers_marks.StepMarks")])
        own = self.work / f"{name}.yaml"
        Path(line[-1].removeprefix("--config=")).rename(own)
        return Run(name, [*_lit_align("fit"), line[0], f"--config={own}"])

    def _released(self, name: str, script: Path, *more: str) -> Run:
        """A training by a peer's script, by its own options alone."""
        return Run(name, [self.python, *self.setting.released(script, *more)], script.parent)

    def _options(self, cache: str | None, lora: bool) -> dict[str, Any]:
        """Overrides of lit-align's configs; a cache is encoded with them too."""
        return self.setting.ours(cache, lora) | VAE | {OPTIMIZER: ADAMW}

    def _environment(self) -> dict[str, str]:
        """One thread, no network, and no files in the peers' checkouts."""
        return offline(self.work) | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


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
    add_peer_options(parser)
    parser.add_argument("--minutes", type=float, default=20.0, help="for everything")
    parser.add_argument("--toy", action="store_true", help="small networks and images, to rehearse")
    arguments = parser.parse_args()
    check_peer_options(parser, arguments)
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="lit-align-peers-")) / "work").resolve()
    work.mkdir(parents=True)
    try:
        record = Record(arguments.out, about("cpu"), 60 * arguments.minutes)
        comparison = Comparison(work, arguments.toy, arguments.peer, arguments.peer_python, record)
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
