"""Measure full-size training on one accelerator, in the order of what matters most, within some minutes.

python benchmarks/accelerator.py --out DIR [--minutes 9] [--peer DIR] [--peer-python PYTHON]
python benchmarks/accelerator.py --out DIR --rehearse          every stage at toy size, on the CPU

It needs the checkout, its dependencies and one card, and no network: pipelines of the published sizes with random
weights and pairs of random images are made on the spot. Each result is written to DIR/results.json and DIR/results.md
as soon as it is there; what fails is recorded, and what no time is left for is skipped. Trainings are `lit-align fit`
on shipped configs, whose overrides are in benchmarks/accelerator_runs.py.

--peer is a checkout, or a folder that holds checkouts, of mapo-t2i/mapo and of huggingface/diffusers: their scripts run
as they are, by PYTHON, whose environment must have what they import (datasets, torchvision, wandb). Without it, that
stage is passed over.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # finds `benchmarks`

from benchmarks.accelerator_estimates import Estimates
from benchmarks.accelerator_peers import Peers
from benchmarks.accelerator_rates import forward_flops, matmul_rate
from benchmarks.accelerator_record import Facts, Record, about
from benchmarks.accelerator_resume import resume
from benchmarks.accelerator_runs import (
    ADAMW,
    BATCH,
    CACHE,
    CHECKPOINTING,
    EIGHT_BIT,
    OBJECTIVE,
    OPTIMIZER,
    PRECISION,
    run_quietly,
    start_afresh,
    train,
    train_words,
    words,
)
from benchmarks.accelerator_score import score
from benchmarks.accelerator_site import Site
from benchmarks.peers_scripts import add_peer_options, check_peer_options

CHANNELS_LAST, COMPILE = "model.backbone.init_args.channels_last", "model.backbone.init_args.compile"
FUSED = "model.optimizer.init_args.fused"
TF32 = ("32-true", "high")
T = TypeVar("T")


class Benchmark:
    """The stages, each of which records its measurements.

    Args:
        site: where they run.
        record: of their results.
        peers: the released scripts.
        estimates: of the trainings' memory, by the doctor.
    """

    def __init__(self, site: Site, record: Record, peers: Peers, estimates: Estimates) -> None:
        self.site, self.record, self.released, self.estimates = site, record, peers, estimates
        self.rate = 0.0  # measured bfloat16 operations per second of the device
        self.flops: dict[str, int] = {}  # of a forward pass over an image, by kind of pipeline
        self.cache: str | None = None  # of SDXL's pairs

    def stages(self) -> list[Callable[[], None]]:
        """All stages, the most valuable ones first."""
        return [
            *(self.device, self.encode, self.lora, self.full, self.kill_and_resume, self.peers, self.levers),
            *(self.score, self.strategies, self.objectives, self.precisions, self.sd15, self.generate, self.more_lora),
        ]

    def device(self) -> None:
        """Rate of the device, and the cost of a forward pass."""

        def measure() -> Facts:
            self.rate = matmul_rate(self.site.device, 256 if self.site.toy else 8192, 0.1 if self.site.toy else 1.0)
            facts: Facts = {"bf16 TFLOP/s of a matrix product": self.rate / 1e12}
            for kind in ("sdxl", "sd15"):
                self.flops[kind] = forward_flops(self.site, kind)
                facts[f"{kind} TFLOP of a forward pass over an image"] = self.flops[kind] / 1e12
            return facts

        self.record.measure("device", "rates", measure)

    def encode(self) -> None:
        """Cache SDXL's pairs."""
        cache = str(self.site.work / "cache")

        def measure() -> Facts:
            line = words(self.site, "sdxl", "mapo_sdxl_lora.yaml", {})
            start = time.perf_counter()
            run_quietly(["encode", *line, f"--output={cache}", f"--accelerator={self.site.accelerator}"])
            self.cache, count = cache, 2 * self.site.count
            return {"images/s, with the start": count / (time.perf_counter() - start)}

        self.record.measure("encode", "SDXL", measure)

    def lora(self) -> None:
        """SDXL LoRA: cached and on the fly, with recomputation and without."""
        self._lora([(2, True, False), (2, False, True), (4, True, False)])

    def more_lora(self) -> None:
        """SDXL LoRA in other batches."""
        self._lora([(2, False, False), (2, True, True), (4, True, True), (1, True, False), (1, False, True)])

    def levers(self) -> None:
        """What makes a step of SDXL LoRA faster, each alone and together; the plain run is among those of `lora`."""
        rows: list[tuple[str, dict[str, Any], float]] = [
            ("channels_last", {CHANNELS_LAST: True}, 15),
            ("compiled blocks", {COMPILE: True}, 60),
            ("AdamW not fused", {FUSED: False}, 15),
            ("channels_last, compiled blocks", {CHANNELS_LAST: True, COMPILE: True}, 15),
        ]
        for name, more, seconds in rows[-1:] if self.site.toy else rows:
            options = {BATCH: 2, CHECKPOINTING: False, CACHE: self.cache, **more}
            title = f"{_title(2, True, False)}, {name}"
            self._train("SDXL LoRA, MaPO", title, "sdxl", "mapo_sdxl_lora.yaml", options, 2, seconds)

    def _lora(self, runs: Sequence[tuple[int, bool, bool]]) -> None:
        """Train with some numbers of pairs, cached or not, with activations recomputed or not."""
        for batch, cached, recompute in self._some(runs, 2):
            options = {BATCH: batch, CHECKPOINTING: recompute, CACHE: self.cache if cached else None}
            self._train("SDXL LoRA, MaPO", _title(batch, cached, recompute), "sdxl", "mapo_sdxl_lora.yaml", options, 2)

    def full(self) -> None:
        """SDXL, all weights, by 8-bit AdamW."""
        for batch, recompute in self._some([(2, True), (4, True), (1, False), (1, True)]):
            options: dict[str, Any] = {BATCH: batch, CHECKPOINTING: recompute, CACHE: self.cache}
            options[OPTIMIZER] = EIGHT_BIT
            name = _title(batch, True, recompute)
            self._train("SDXL, all weights, 8-bit AdamW, MaPO", name, "sdxl", "mapo_sdxl.yaml", options, 3)

    def objectives(self) -> None:
        """What a reference costs: the LoRA is switched off for it."""
        for name, passes in (("MaPO", 2), ("DiffusionDPO", 3)):
            options: dict[str, Any] = {BATCH: 2, CHECKPOINTING: False, CACHE: self.cache}
            options[OBJECTIVE] = {"class_path": f"lit_align.objectives.{name}"}
            self._train("SDXL LoRA by objective", name, "sdxl", "mapo_sdxl_lora.yaml", options, passes)

    def precisions(self) -> None:
        """Losses of the first steps in each precision."""
        for precision, matmul in (*((p, None) for p in ("bf16-mixed", "32-true", "16-mixed", "bf16-true")), TF32):
            options = {BATCH: 1, CHECKPOINTING: True, CACHE: self.cache, PRECISION: precision}
            options["model.float32_matmul"] = matmul
            name = precision if matmul is None else f"{precision}, matrix products {matmul}"
            self._train("SDXL LoRA by precision", name, "sdxl", "mapo_sdxl_lora.yaml", options, 2)

    def sd15(self) -> None:
        """SD1.5, all weights."""
        for batch in self._some([4, 8]):
            options = {BATCH: batch, CHECKPOINTING: False}
            self._train("SD1.5, all weights, MaPO", _title(batch, False, False), "sd15", "mapo_sd15.yaml", options, 3)

    def strategies(self) -> None:
        """DDP and FSDP2 on this one device."""
        sharded = {"class_path": "lit_align.training.strategies.FSDP2"}
        for name, strategy in (("ddp", "ddp"), ("FSDP2", sharded)):
            options: dict[str, Any] = {BATCH: 1, CHECKPOINTING: True, CACHE: self.cache, "trainer.strategy": strategy}
            options[OPTIMIZER] = ADAMW  # FSDP2 takes those of torch alone
            self._train("SDXL, all weights, by strategy", name, "sdxl", "mapo_sdxl.yaml", options, 3)

    def kill_and_resume(self) -> None:
        """A run that is killed and resumed, beside the unbroken one."""
        self.record.measure(
            "kill -9 and resume", "SDXL LoRA", partial(resume, self.site, self.cache, self.record.left), 90
        )

    def peers(self) -> None:
        """The released scripts beside lit-align."""
        self.released.measure(self.cache)

    def score(self) -> None:
        """Scores of a model of HPSv2's size, beside that model alone."""
        self.record.measure("score", "HPSv2's size, random weights", partial(score, self.site), 40)

    def generate(self) -> None:
        """Images of prompts by SDXL."""
        steps = 2 if self.site.toy else 25

        def measure() -> Facts:
            count, prompts = (2 if self.site.toy else 8), self.site.work / "prompts.txt"
            prompts.write_text("".join(f"a red fox number {number}\n" for number in range(count)))
            side = self.site.resolution("sdxl")
            line = [f"--prompts={prompts}", f"--output={self.site.work / 'images'}", f"--steps={steps}"]
            line += [f"--model={self.site.pipeline('sdxl')}", f"--accelerator={self.site.accelerator}"]
            start = time.perf_counter()
            run_quietly(["predict", *line, f"--height={side}", f"--width={side}"])
            return {"images/s, with the start": count / (time.perf_counter() - start)}

        self.record.measure(f"predict, {steps} steps", "SDXL", measure)

    def _some(self, values: Sequence[T], count: int = 1) -> Sequence[T]:
        """Return all values; the first `count` of them in a rehearsal."""
        return values[:count] if self.site.toy else values

    def _train(
        self,
        stage: str,
        name: str,
        kind: str,
        config: str,
        options: dict[str, Any],
        passes: int,
        seconds: float = 15.0,
    ) -> None:
        """Record a training; `passes` is its cost in forward passes, recomputation not counted.

        `seconds` is what it takes at least.
        """
        if CACHE in options and options[CACHE] is None and "on the fly" not in name:
            return  # without its cache it would not be what its name says

        line: list[str] = []

        def measure() -> Facts:
            line.extend(train_words(self.site, kind, config, options))
            facts = train(self.site, line)
            if kind in self.flops and self.rate:
                facts["model FLOPs utilisation"] = facts["pairs/s"] * 2 * passes * self.flops[kind] / self.rate
            return facts

        self.estimates.go_on()
        found = self.record.measure(stage, name, measure, seconds)
        if found is not None and not (self.site.toy and self.estimates.asked):  # one is enough to rehearse
            self.estimates.ask(stage, name, line)


def _title(batch: int, cached: bool, recompute: bool) -> str:
    source, activations = "cached" if cached else "on the fly", "recomputed" if recompute else "kept"
    return f"{batch} pairs, {source}, activations {activations}"


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--rehearse", action="store_true", help="all stages at toy size, on the CPU")
    parser.add_argument("--stages", nargs="+", help="names of stages, in place of all")
    parser.add_argument("--work", type=Path, help="folder for pipelines and pairs, about 10 GB; none: a temporary one")
    add_peer_options(parser)
    arguments = parser.parse_args()
    check_peer_options(parser, arguments)
    device = "cuda" if torch.cuda.is_available() and not arguments.rehearse else "cpu"
    if device == "cpu" and not arguments.rehearse:
        parser.error("this machine has no CUDA device; --rehearse runs at toy size on the CPU")
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="lit-align-benchmark-"))).resolve()
    if arguments.rehearse:
        torch.compiler.set_stance("force_eager")  # compiling takes minutes on a CPU
    try:
        work.mkdir(parents=True, exist_ok=True)
        record = Record(arguments.out, about(device), 60 * arguments.minutes, start_afresh)
        site = Site(work, device, arguments.rehearse, 0 if arguments.rehearse else 8)
        run(site, record, Peers(arguments.peer, arguments.peer_python, site, record), arguments.stages)
        if arguments.rehearse and (failed := [row["name"] for row in record.rows if "failed" in row]):
            sys.exit(f"{len(failed)} of {len(record.rows)} measurements failed: {', '.join(failed)}")
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)


def run(site: Site, record: Record, peers: Peers, names: Sequence[str] | None) -> None:
    """Run the stages of these names, or all."""
    with Estimates(record, site.work, at_once=1 if site.toy else 2) as estimates:
        for stage in Benchmark(site, record, peers, estimates).stages():
            if names is None or stage.__name__ in names:
                stage()
        estimates.finish()


if __name__ == "__main__":
    main()
