"""What a run does when it is told that it must end soon: a checkpoint, and an exit code that says why."""

import os
import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import _TunerExitException

from lit_align.callbacks.step_progress import total_steps
from lit_align.training.checkpoints.atomic_io import checkpoint_folders
from lit_align.training.steps import at_step

NAME = "preempted.ckpt"
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_CODES = {signal.SIGUSR1: REQUEUE, signal.SIGTERM: 128 + signal.SIGTERM}


class NotedSignals(_SignalConnector):
    """Stands in the place of Lightning's handlers and notes a signal, which is all that is safe in a handler.

    Lightning's save and requeue, or broadcast, at whatever point the run is; its ranks would wait for each other.

    Args:
        trainer: whose signals they are.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__(trainer)
        self.exit_code = 0  # of the gravest signal that came to this process
        self.ended = False  # whether all ranks have agreed to end

    def register_signal_handlers(self) -> None:
        """Called in `setup`, and by Lightning again before the first step."""
        if not self._original_handlers:
            self._original_handlers = {number: signal.getsignal(number) for number in EXIT_CODES}
        for number in EXIT_CODES:
            self._register_signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number)
        self.exit_code = max(self.exit_code, EXIT_CODES[name])
        if self.trainer.is_global_zero:  # not by `logging`, whose stream may be what the signal has interrupted
            os.write(2, f"{name.name}: a checkpoint will be written after this step, then the run ends.\n".encode())

    def teardown(self) -> None:
        """As it was; but once a run has ended so, SLURM signals the ranks that end last, which must keep their code."""
        for number, handler in self._original_handlers.items():
            self._register_signal(number, signal.SIG_IGN if self.ended else handler)
        self._original_handlers = {}


class Preemption(L.Callback):
    """Ends a run at the next optimizer step after SIGUSR1 (SLURM's warning) or SIGTERM, with a checkpoint.

    Ranks agree on it by a reduction of one number after each step. The checkpoint, `preempted.ckpt` beside the others,
    is written after all other callbacks have acted on the step, so the resumed run is the unbroken one. A signal during
    validation, a sample grid or the preparation waits for the next step; one after the last step changes nothing.

    `exit_code` is 75 after SIGUSR1, 143 after SIGTERM, else 0. The process is to exit with it; until then it ignores
    both signals. For a validation that was due at that step see `DueValidation`.
    """

    def __init__(self) -> None:
        self.exit_code = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.exit_code = 0
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]  # after ModelCheckpoint, whose state is saved
        self._signals = NotedSignals(trainer)
        trainer._signal_connector = self._signals
        self._signals.register_signal_handlers()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step(trainer):
            return
        code = agreed(trainer, self._signals.exit_code)
        if not code:
            return
        last = trainer.should_stop or trainer.global_step == total_steps(trainer)
        path = checkpoint_folders(trainer)[0] / NAME
        trainer.save_checkpoint(path, weights_only=False)
        self.exit_code = 0 if last else code
        then = "this was the last step" if last else f"the run ends with exit code {code}"
        rank_zero_info(f"Preemption: step {trainer.global_step:,} is saved in {path}; {then}.")

    # -- the end: not in the hook above, after which the module logs the step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._end()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def _end(self) -> None:
        """Leave `Trainer.fit`, which returns, with loggers finalized.

        `should_stop` would have Lightning validate first, and save an epoch as ended that is not.
        """
        if self.exit_code:
            self._signals.ended = True
            raise _TunerExitException


def agreed(trainer: L.Trainer, exit_code: int) -> int:
    """The greatest exit code of all ranks; without a reduction where there is one rank."""
    if trainer.world_size == 1:
        return exit_code
    code = torch.tensor(exit_code, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(code, reduce_op="max"))
