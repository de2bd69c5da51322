"""Ends a run early on a signal: with a checkpoint, and an exit code that names the signal."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import isinf
from types import FrameType
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lit_align.internals import leave_fit, replace_signal_handlers
from lit_align.training.checkpoints.last_checkpoint import checkpoint_folders
from lit_align.training.steps import at_step, total_steps

NAME = "preempted.ckpt"
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later
STARTING = "what is at work before the first step stops after a sampling step or a batch"
EXIT_CODES = {number: 128 + number for number in (signal.SIGINT, signal.SIGTERM)} | {signal.SIGUSR1: REQUEUE}


class NotedSignals:
    """Replaces Lightning's signal handlers by ones that only note the signal, which is safe in a handler.

    Lightning's handlers save and requeue, or broadcast, at any point of the run; its ranks would wait for each other.

    Args:
        trainer: whose handlers are replaced.
    """

    received_sigterm = False  # read by Lightning, which ends the run by itself where it is true

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer
        self.exit_code = 0  # of the gravest signal that this process received
        self._interrupted = False  # by Ctrl-C
        self.training = False  # whether the first step has begun
        self.ended = False  # whether all ranks have agreed to end
        self._previous: dict[signal.Signals, Any] = {}

    def register_signal_handlers(self) -> None:
        """Install the handlers: called in `setup`, and by Lightning again before the first step."""
        if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
            return
        self._previous = self._previous or {number: signal.getsignal(number) for number in EXIT_CODES}
        for number in EXIT_CODES:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number)
        if name == signal.SIGINT and self._interrupted:
            self._end_at_once()
        self._interrupted |= name == signal.SIGINT
        self.exit_code = max(self.exit_code, EXIT_CODES[name])
        if self.trainer.is_global_zero:  # not by `logging`: the signal may have interrupted its stream
            again = " Ctrl-C again ends it at once." if name == signal.SIGINT else ""
            before = "a checkpoint will be written after this step" if self.training else STARTING
            os.write(2, f"{name.name}: {before}, then the run ends.{again}\n".encode())

    def _end_at_once(self) -> None:
        for checkpoint in self.trainer.checkpoint_callbacks:
            if isinstance(checkpoint, ModelCheckpoint):
                checkpoint.save_on_exception = False  # a large checkpoint takes minutes
        raise KeyboardInterrupt

    def teardown(self) -> None:
        """Restore the previous handlers. After a preemption ignore signals, so that late ranks keep their exit code."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self.ended and number != signal.SIGINT else handler)
        self._previous = {}


class Preemption(L.Callback):
    """Ends a run at the next optimizer step after SIGUSR1 (SLURM's warning), SIGTERM or Ctrl-C, with a checkpoint.

    After each step the ranks agree on it by reducing one number. The checkpoint, `preempted.ckpt` beside the others, is
    written after all other callbacks have acted, so that the resumed run equals the unbroken one. A signal during
    validation or a sample grid waits for the next step; a signal after the last step has no effect. A second Ctrl-C
    ends the run at once, without a checkpoint.

    Before the first step there is nothing to save. The ranks agree after each batch of a validation, each sampling step
    of an image and each evaluation by `DivergenceGuard`, and end there: a new run has no checkpoint, and a resumed one
    has that from which it was resumed.

    `exit_code` is 75 after SIGUSR1, 130 after Ctrl-C, 143 after SIGTERM, else 0. The process should exit with it, and
    ignores these signals until then. A validation that was due at that step runs after the resume, see `DueValidation`.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._shared_batches = 0  # that every rank has, of a validation before the first step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.exit_code = 0
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]  # after ModelCheckpoint, whose state is saved
        self._signals = NotedSignals(trainer)
        replace_signal_handlers(trainer, self._signals)
        self._signals.register_signal_handlers()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end_before_first_step(trainer)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end_before_first_step(trainer)  # the encoders have been loaded meanwhile

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        # Not after a rank's last batch: others may have more, and FSDP2 lets it take part in theirs meanwhile.
        if batch_idx < self._shared_batches - 1:
            self.end_before_first_step(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end_before_first_step(trainer)

    def end_before_first_step(self, trainer: L.Trainer) -> None:
        """End a run that has not begun its first step if a rank has received a signal; until then a collective."""
        if self._signals.training:
            return
        self.exit_code = gravest(trainer, self._signals.exit_code)
        if self.exit_code:
            path = trainer.ckpt_path  # Lightning restores the step after `on_fit_start`
            state = f"It can be resumed again from {path}." if path else "There is nothing to save."
            rank_zero_info(f"Preemption: the run ends before its first step with exit code {self.exit_code}. {state}")
        self._end()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_step(trainer) and (code := gravest(trainer, self._signals.exit_code)):
            last = trainer.should_stop or trainer.global_step == total_steps(trainer)
            path = checkpoint_folders(trainer)[0] / NAME
            trainer.save_checkpoint(path, weights_only=False)
            self.exit_code = 0 if last else code
            then = "this was the last step" if last else f"the run ends with exit code {code}"
            rank_zero_info(f"Preemption: step {trainer.global_step:,} is saved in {path}; {then}.")

    # The run ends in the next hook, not in the one above: after that one the module logs the step.

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.end_before_first_step(trainer)
        self._signals.training = True
        self._end()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()
        if trainer.state.fn == TrainerFn.FITTING and not self._signals.training:
            counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            own = sum(counts)  # infinite for a loader without a length
            self._shared_batches = reduced(trainer, 0 if isinf(own) else int(own), "min")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._shared_batches = 0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def _end(self) -> None:
        if self.exit_code:
            self._signals.ended = True
            leave_fit()


def end_if_signalled(trainer: L.Trainer) -> None:
    """End a run before its first step if a rank has received a signal: a collective there, and nothing afterwards."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set in Trainer's constructor
        if isinstance(callback, Preemption):
            callback.end_before_first_step(trainer)


def requeue_on_usr1() -> None:
    """Exit at once on SIGUSR1, with its code, until `Preemption` is set up; Python would die of it with code 138."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(REQUEUE))


@contextmanager
def ctrl_c_code() -> Iterator[None]:
    """Exit with 130 after Ctrl-C, as shells and our other commands do; Lightning exits with 1."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            sys.exit(EXIT_CODES[signal.SIGINT])
        raise


def gravest(trainer: L.Trainer, exit_code: int) -> int:
    """Return the greatest exit code of all ranks."""
    return reduced(trainer, exit_code, "max")


def reduced(trainer: L.Trainer, number: int, operation: Literal["max", "min"]) -> int:
    """Return the greatest or the least number of all ranks; a collective."""
    if trainer.world_size == 1:
        return number
    tensor = torch.tensor(number, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(tensor, reduce_op=operation))
