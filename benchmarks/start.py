"""Measure the CPU seconds that `lit-align fit` takes until its first step, by part.

python benchmarks/start.py [--config configs/quickstart.yaml]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L

ROOT = Path(__file__).parents[1]


class Marks(L.Callback):
    """Writes the CPU seconds of this process at some hooks, and ends it before the first step.

    Args:
        path: text file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def mark(self, name: str) -> None:
        """Add the seconds since the process began, with the name of what has just ended."""
        with Path(self.path).open("a") as file:
            file.write(f"{time.process_time():.2f} {name}\n")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.mark("imports, config, model and data")

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.mark("encoders and banner")

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.mark("first validation")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.mark("start of the callbacks, and the first batch")
        os._exit(0)


def main() -> None:
    """Run `fit` on one thread, and print a line for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "marks.txt"
        line = [f"--config={arguments.config}", f"--trainer.logger.init_args.save_dir={folder}"]
        line += ["--trainer.callbacks+=benchmarks.start.Marks", f"--trainer.callbacks.path={path}"]
        command = [sys.executable, "-m", "lit_align", "fit", *line]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if not path.exists():
            sys.exit(done.stderr[-2000:])
        before = 0.0
        for text in path.read_text().splitlines():
            seconds, name = text.split(maxsplit=1)
            print(f"{float(seconds) - before:6.2f} CPU s  {name}")
            before = float(seconds)


if __name__ == "__main__":
    main()
