"""Train every shipped config at full size on the CPU: two steps, a resume, an export, and the memory of each.

python benchmarks/full_size_runs.py --out DIR [--work DIR] [--only NAME ...] [--toy]

Each run is `lit-align fit` on a shipped config with a pair of 256 px a step and random weights of the published sizes.
It saves after its first and its second step, resumes from the first, and must end with equal weights; diffusers loads
the export, whose weights must be the trained ones. What a machine's memory does not hold is computed by the doctor.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # finds `benchmarks`

from benchmarks.accelerator_estimates import total
from benchmarks.accelerator_record import ROOT, Facts, Record, about
from benchmarks.accelerator_runs import callback, words
from benchmarks.accelerator_site import Site
from benchmarks.peers_marks import peak_bytes
from lit_align.backbones.loading.trained import read_trained
from lit_align.backbones.lora import POLICY
from lit_align.data.labels.score_files import Identity, Scores, side_file, write_scores
from lit_align.data.shards.index import scan_rows

SIDE = 256  # of the images, pixels
STEPS = 2
LORA = {"rank": 8, "alpha": 8, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
VOTERS = ("hpsv2.1", "clip", "aesthetic", "pickscore")  # of the shipped configs
TOO_LARGE = ("mapo_sdxl", "balanced_dpo_sdxl", "diffusion_dpo_sdxl")  # for 24 GB
STEP_RECORD, CHECKPOINT = "benchmarks.full_size_runs.StepRecord", "lightning.pytorch.callbacks.ModelCheckpoint"


@dataclass(frozen=True)
class Run:
    """A training: a shipped config, as it is or with a LoRA in place of its whole denoiser."""

    config: str
    kind: str
    lora: bool = False

    @property
    def name(self) -> str:
        """Its name in the record."""
        return f"{self.config}{' + LoRA' if self.lora else ''}"


RUNS = [
    *(Run(f"{method}_sdxl_lora", "sdxl") for method in ("mapo", "balanced_dpo")),
    *(Run(f"{method}_sd15", "sd15") for method in ("mapo", "balanced_dpo", "diffusion_dpo")),
    *(Run(f"{method}_sd21", "sd21") for method in ("mapo", "balanced_dpo")),
    *(Run(f"mapo_{kind}", kind, lora=True) for kind in ("sd15", "sd21")),
    *(Run(f"{method}_sdxl", "sdxl") for method in ("mapo", "balanced_dpo", "diffusion_dpo")),
]


class StepRecord(L.Callback):
    """Writes the CPU seconds of each step, and the peak of the main memory in all steps.

    Args:
        path: JSON file.
    """

    def __init__(self, path: str) -> None:
        self.path, self.started = path, 0.0
        self.seconds: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # sets the kernel's peak back to what is in use now
        self.started = time.process_time()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(time.process_time() - self.started)
        found = {"seconds": self.seconds, "peak": peak_bytes(), "loss": outputs["loss"].item()}
        Path(self.path).write_text(json.dumps(found))
        self.started = time.process_time()


def score(shard: str) -> None:
    """Store scores of a shard's pairs by all voters of the shipped configs, so that no scorer is loaded."""
    path = side_file(shard)
    if not path.exists():
        rows = scan_rows(shard, whole=True)
        keys, contents = rows["key"].to_pylist(), rows["content"].to_pylist()
        values = Scores(Identity(1, "none"), keys, contents, torch.ones(len(keys)), torch.zeros(len(keys)))
        write_scores(path, dict.fromkeys(VOTERS, values))


class Trial:
    """One run with all that follows it.

    Args:
        site: of pipelines and pairs.
        run: what to train.
        precision: of the Trainer.
    """

    def __init__(self, site: Site, run: Run, precision: str) -> None:
        self.site, self.run = site, run
        self.lora = run.lora or run.config.endswith("_lora")
        self.folder, self.steps = site.work / "runs" / run.name, site.work / "steps.json"
        score(site.pairs(run.kind))
        kept = {"dirpath": str(self.folder), "every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
        callbacks = [callback(STEP_RECORD, path=str(self.steps)), callback(CHECKPOINT, **kept)]
        if run.config.startswith("balanced"):
            callbacks.append(callback("lit_align.callbacks.ReferenceUpdate", every_n_steps=1, alpha=1.0))
        options: dict[str, Any] = {"data.batch_size": 1, "trainer.max_steps": STEPS}
        options |= {"trainer.enable_checkpointing": True, "trainer.default_root_dir": str(self.folder)}
        options |= {"trainer.precision": precision, "model.backbone.init_args.vae_precision": "fp32"}
        if run.lora:
            options["model.backbone.init_args.lora"] = LORA
        self.line = words(site, run.kind, f"{run.config}.yaml", options, callbacks)

    def measure(self, fits: bool = True) -> Facts:
        """Train, resume, export and load; only ask the doctor where the training does not fit."""
        facts = {"doctor's GB": self._doctor()}
        if not fits:
            return facts
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            return facts | self._train() | self._resume() | self._export()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _doctor(self) -> float:
        expected = total(command(["doctor", *self.line], codes=(0, 1)).text)
        assert expected is not None, "the doctor's report has no total"
        return expected / 1e9

    def _train(self) -> Facts:
        done = command(["fit", *self.line])
        found = json.loads(self.steps.read_text())
        self.digest = digest(self.folder / f"step={STEPS}.ckpt")
        size = sum(file.stat().st_size for file in self.folder.glob("*.ckpt")) / STEPS
        return {
            "CPU s a step": min(found["seconds"]),
            "peak GB of the steps": found["peak"] / 1e9,
            "peak GB of the process": done.peak / 1e9,
            "checkpoint GB": size / 1e9,
            "loss": found["loss"],
        }

    def _resume(self) -> Facts:
        """Go on from the first step's checkpoint: the end must be that of the unbroken run."""
        (self.folder / f"step={STEPS}.ckpt").unlink()
        command(["fit", *self.line, f"--ckpt_path={self.folder / 'step=1.ckpt'}"])
        assert len(json.loads(self.steps.read_text())["seconds"]) == STEPS - 1, "the run did not resume"
        same = digest(self.folder / f"step={STEPS}.ckpt") == self.digest
        return {"resumed": "equal weights" if same else "other weights"}

    def _export(self) -> Facts:
        (self.folder / "step=1.ckpt").unlink()
        checkpoint, output = self.folder / f"step={STEPS}.ckpt", self.folder / "export"
        command(["export", f"--ckpt_path={checkpoint}", f"--output={output}"])
        trained = read_trained(checkpoint).weights
        if self.lora:
            pipeline = DiffusionPipeline.from_pretrained(self.site.pipeline(self.run.kind), torch_dtype=torch.bfloat16)
            pipeline.load_lora_weights(output)
            loaded = {name: value for name, value in pipeline.unet.state_dict().items() if ".lora_" in name}
            trained = {name.replace(f".{POLICY}.", ".default_0."): value for name, value in trained.items()}
        else:
            loaded = UNet2DConditionModel.from_pretrained(output).state_dict()
        equal = sum(value.to(loaded[name].dtype).equal(loaded[name]) for name, value in trained.items())
        return {"diffusers loads": f"{equal} of {len(trained)} weights equal, {len(loaded) - len(trained)} more"}


class Done(NamedTuple):
    """A command that has ended."""

    text: str
    peak: int  # of its main memory, bytes


def command(line: list[str], codes: Sequence[int] = (0,)) -> Done:
    """Run a command in a process of its own; another exit code is an error."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, "-m", "lit_align", *line], cwd=ROOT, stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode()
    if process.returncode not in codes:
        raise RuntimeError(f"lit-align {line[0]}: exit code {process.returncode}: {text[-2000:]}")
    return Done(text, used.ru_maxrss * 1024)


def digest(checkpoint: Path) -> str:
    """Return a digest of a checkpoint's trained weights."""
    found = hashlib.sha256()
    for name, value in sorted(read_trained(checkpoint).weights.items()):
        found.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def memory() -> int:
    """Return the bytes of this machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main() -> None:
    """Measure all runs, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--work", type=Path, required=True, help="folder for pipelines and runs, up to 35 GB")
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS], help="in place of all runs")
    parser.add_argument(
        "--precision", default="32-true", help="of CPUs without bfloat16 units, which are far slower in it"
    )
    parser.add_argument("--toy", action="store_true", help="small networks, to rehearse")
    arguments = parser.parse_args()
    site = Site(arguments.work.resolve(), "cpu", arguments.toy, 0, 64 if arguments.toy else SIDE)
    site.work.mkdir(parents=True, exist_ok=True)
    facts = {**about("cpu"), "threads": torch.get_num_threads(), "main memory, GB": round(memory() / 1e9, 1)}
    facts["precision"] = arguments.precision
    record = Record(arguments.out, facts, math.inf)
    for run in RUNS:
        if arguments.only is None or run.name in arguments.only:
            fits = arguments.toy or run.config not in TOO_LARGE
            trial = Trial(site, run, arguments.precision)
            record.measure("trained" if fits else "computed by the doctor", run.name, partial(trial.measure, fits))


if __name__ == "__main__":
    main()
