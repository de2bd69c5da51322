"""A callback for configs that sends a signal in the middle of the work before the first step."""

import os
import signal
from pathlib import Path

import lightning as L


class SendAtPass(L.Callback):
    """Sends a signal to its own process when the denoiser begins its n-th pass, and counts the passes of the run.

    Args:
        number: name of the signal.
        at: the pass; -1 sends it in `setup`, before `Preemption` is set up, and 0 in `on_fit_start`.
        file: into which each rank writes its passes, behind its number as suffix.
        rank: that sends; None: all.
    """

    def __init__(self, number: str, at: int, file: str, rank: int | None = None) -> None:
        self.number, self.at, self.file, self.rank, self.passes = signal.Signals[number], at, file, rank, -2

    def setup(self, trainer, pl_module, stage):
        self.own = self.rank in (None, trainer.global_rank)
        self.count()

    def on_fit_start(self, trainer, pl_module):
        self.count()
        pl_module.backbone.denoiser.register_forward_pre_hook(self.count)

    def count(self, *arguments):
        self.passes += 1
        if self.own and self.passes == self.at:
            os.kill(os.getpid(), self.number)

    def teardown(self, trainer, pl_module, stage):
        Path(f"{self.file}.{trainer.global_rank}").write_text(str(self.passes))
