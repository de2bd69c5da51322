"""Train on one process and on two with gloo: CPU seconds and time a step for the same pairs, one thread each.

python benchmarks/processes.py [--steps 20]

It trains configs/quickstart.yaml, 16 pairs a step in all. The first steps are not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L

ROOT = Path(__file__).parents[1]
PAIRS, WARM = 16, 3  # pairs a step; steps that are not counted
KINDS = {
    "all weights": [],
    "LoRA": ["--model.backbone.lora.rank=8", "--model.backbone.lora.alpha=8"],
}


class Clock(L.Callback):
    """Writes each step's end on this rank: time, and CPU seconds of the process.

    Args:
        folder: gets a file for each rank.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.ends = Path(folder), list[tuple[float, float]]()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ends.append((time.monotonic(), time.process_time()))
        if trainer.global_step == trainer.max_steps:
            (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(self.ends))


def train(processes: int, options: list[str], steps: int) -> tuple[float, float]:
    """Train, and return the median time of a step and the CPU seconds that it costs all processes."""
    with tempfile.TemporaryDirectory() as folder:
        line = ["--config=configs/quickstart.yaml", f"--trainer.logger.init_args.save_dir={folder}", *options]
        line += [f"--trainer.max_steps={steps}", "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0"]
        line += [f"--trainer.devices={processes}", "--trainer.strategy=ddp", f"--data.batch_size={PAIRS // processes}"]
        clock = {"class_path": "benchmarks.processes.Clock", "init_args": {"folder": folder}}
        line += [f"--trainer.callbacks={json.dumps([clock])}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lit_align", "fit", *line]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        files = sorted(Path(folder).glob("*.json"))
        if len(files) != processes:
            sys.exit(done.stderr[-2000:])
        ranks = [json.loads(file.read_text())[WARM - 1 :] for file in files]
    times = [end[0] - begin[0] for begin, end in zip(ranks[0], ranks[0][1:], strict=False)]
    cpu = sum(rank[-1][1] - rank[0][1] for rank in ranks) / (steps - WARM)
    return median(times), cpu


def main() -> None:
    """Print a line for each kind and number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    for kind, options in KINDS.items():
        for processes in (1, 2):
            seconds, cpu = train(processes, options, arguments.steps)
            print(
                f"{kind}, {processes} x {PAIRS // processes} pairs: {1000 * seconds:.0f} ms and {cpu:.2f} CPU s a step"
            )


if __name__ == "__main__":
    main()
