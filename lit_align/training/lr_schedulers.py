"""Learning-rate schedules that a config can hold, and what is checked of any schedule before the first step."""

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer, lr_scheduler

from lit_align.training.steps import accumulation, total_steps
from lit_align.user_errors import UserValueError

CHAINS = (lr_scheduler.SequentialLR, lr_scheduler.ChainedScheduler)
Plateau = lr_scheduler.ReduceLROnPlateau
TRIED_STEPS = 200_000  # of a schedule before the run, in seconds; later steps are not tried
RISES = ("chosen_error_rise", "chosen_worse_than_start")  # of the callback ChosenErrorRise


class SequentialLR(lr_scheduler.SequentialLR):
    """Follows one schedule after another, such as warm-up and then cosine.

    Args:
        optimizer: of the run.
        schedulers: in their order; each starts to count when its turn comes.
        milestones: optimizer steps at which the second schedule and those after it begin.
    """

    def __init__(self, optimizer: Optimizer, schedulers: list[LRSchedulerCallable], milestones: list[int]) -> None:
        if any(later <= earlier for earlier, later in pairwise([0, *milestones])):
            raise UserValueError(f"model.lr_scheduler.milestones are {milestones}; they must increase, from 1 or more.")
        parts = [make(optimizer) for make in schedulers]
        if nested := [part for part in parts if isinstance(part, CHAINS)]:
            raise UserValueError(
                f"model.lr_scheduler: {type(nested[0]).__name__} cannot be a part of a sequence. List its parts."
            )
        super().__init__(optimizer, parts, milestones)


class ChainedScheduler(lr_scheduler.ChainedScheduler):
    """Follows several schedules at a time: their factors are multiplied.

    Args:
        optimizer: of the run.
        schedulers: that change the rate by a factor in each step.
    """

    def __init__(self, optimizer: Optimizer, schedulers: list[LRSchedulerCallable]) -> None:
        super().__init__([make(optimizer) for make in schedulers], optimizer)


class ReduceLROnPlateau(Plateau):
    """Lowers the rate when a held-out value has stopped improving; it counts validations.

    Args:
        optimizer: of the run.
        monitor: a value of the validation, such as `val/loss`.
        mode: `min` where a smaller value is better, else `max`.
        factor: of the rate when it is lowered.
        patience: validations without a better value before the rate is lowered.
        threshold: change that counts as better.
        threshold_mode: `rel`: the threshold is a share of the best value; `abs`: it is a difference.
        cooldown: validations after a lower rate that do not count.
        min_lr: below which the rate is not lowered.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        monitor: str,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        super().__init__(optimizer, mode, factor, patience, threshold, threshold_mode, cooldown, min_lr)
        self.monitor = monitor


def make_scheduler(make: LRSchedulerCallable, optimizer: Optimizer) -> Any:
    """Make a schedule.

    Raises:
        UserValueError: if its settings do not fit together.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a sequence sets the first rate of all its parts
            return make(optimizer)
    except UserValueError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise UserValueError(f"model.lr_scheduler: {error}") from error


def try_rates(optimizer: OptimizerCallable, make: LRSchedulerCallable, steps: int) -> list[float]:
    """Follow a schedule through all steps of a run, on an optimizer of one number, and return the rates.

    Raises:
        UserValueError: where the schedule ends before the run, or a rate is negative or not finite.
    """
    trial = optimizer([torch.nn.Parameter(torch.zeros(1, 1))])  # a matrix, as Muon takes nothing else
    scheduler = make_scheduler(make, trial)
    rates = [float(trial.param_groups[0]["lr"])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer takes no step here
        for step in range(1, min(steps, TRIED_STEPS) + 1):  # Lightning also steps after the last one
            try:
                if not isinstance(scheduler, Plateau):
                    scheduler.step()
            except (IndexError, NotImplementedError, ValueError, ZeroDivisionError) as error:
                raise UserValueError(f"model.lr_scheduler fails at step {step} of {steps:,}: {error}") from error
            rates.append(float(trial.param_groups[0]["lr"]))
    rates.pop()
    wrong = next((i for i, rate in enumerate(rates) if not (math.isfinite(rate) and rate >= 0)), None)
    if wrong is not None:
        raise UserValueError(f"model.lr_scheduler: the learning rate of step {wrong + 1:,} is {rates[wrong]:g}.")
    return rates


def rate_lines(optimizer: OptimizerCallable, make: LRSchedulerCallable | None, steps: int | None) -> list[str]:
    """Describe the rates of a run's steps; no line where they do not change.

    Raises:
        UserValueError: see `try_rates`.
    """
    if make is None:
        return []
    rates = try_rates(optimizer, make, TRIED_STEPS if steps is None else steps)
    return [f"  rate        {describe_rates(rates)}"]


def describe_rates(rates: Sequence[float]) -> str:
    """Describe the learning rates of a run by its first, highest and last one, and by the steps that have none."""
    top = max(range(len(rates)), key=rates.__getitem__)
    zero = sum(rate == 0 for rate in rates)
    nothing = f"; it is 0, and nothing is trained, in {zero:,} steps" if zero else ""
    return f"{rates[0]:.3g} in step 1, at most {rates[top]:.3g} (step {top + 1:,}), last {rates[-1]:.3g}{nothing}"


def with_schedule(
    trainer: L.Trainer,
    make_optimizer: OptimizerCallable,
    optimizer: Optimizer,
    make: LRSchedulerCallable,
    measured: Sequence[str],
) -> OptimizerLRScheduler:
    """Join an optimizer and its schedule for Lightning, after the checks of this file.

    Args:
        trainer: of the run.
        make_optimizer: makes further optimizers of the same kind.
        optimizer: of the run.
        make: makes the schedule.
        measured: names of the values that a validation logs, without `val/`.
    """
    try_rates(make_optimizer, make, max(trainer.max_steps, 1))
    scheduler = make_scheduler(make, optimizer)
    if isinstance(scheduler, Plateau):
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set in Trainer's constructor
        known = all(type(callback).__module__.startswith(("lit_align.", "lightning.")) for callback in callbacks)
        held_out = getattr(trainer.datamodule, "val", True) is not None  # type: ignore[attr-defined]  # set by Trainer.fit
        check_monitor(scheduler, monitored(measured), known, held_out and trainer.limit_val_batches != 0)
    # Lightning would ask for the monitored value after every step; see `follow_validation`.
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step", "reduce_on_plateau": False},
    }


def monitored(measured: Sequence[str]) -> list[str]:
    """List the names that a schedule may wait for."""
    return [f"val/{name}" for name in (*measured, *RISES)]


def check_monitor(scheduler: Plateau, measured: Sequence[str], all_known: bool, validates: bool) -> None:
    """Refuse a schedule on a value that no validation measures.

    Args:
        scheduler: waits for the value.
        measured: names of the values of a validation.
        all_known: whether no callback may log further ones.
        validates: whether the run has validations.
    """
    monitor = getattr(scheduler, "monitor", None)
    if monitor is None:
        raise UserValueError(
            "model.lr_scheduler: torch's ReduceLROnPlateau does not say which value it waits for. Set class_path to "
            f"{__name__}.ReduceLROnPlateau, and its monitor."
        )
    if not validates:
        raise UserValueError(
            f"model.lr_scheduler.monitor is {monitor!r}, but the run has no validation. Set data.val_shards and "
            "trainer.limit_val_batches, or choose a schedule that takes numbers."
        )
    if not monitor.startswith("val/") or (all_known and monitor not in measured):
        raise UserValueError(
            f"model.lr_scheduler.monitor is {monitor!r}, which no validation measures. Choose from "
            f"{', '.join(name for name in measured if '/t' not in name)}."
        )


def check_first_validation(trainer: L.Trainer) -> None:
    """Refuse a schedule on a plateau in a run that ends before its first validation; called when training starts.

    Raises:
        UserValueError: naming the micro-batch of the first validation.
    """
    steps = total_steps(trainer)
    waits = any(isinstance(config.scheduler, Plateau) for config in trainer.lr_scheduler_configs)
    if not waits or steps is None or steps < 0 or accumulation(trainer) is not None:
        return  # where the run has no known number of micro-batches
    interval, epoch = float(trainer.val_check_batch or 0), trainer.num_training_batches
    epochs = trainer.check_val_every_n_epoch
    first = interval if epochs is None else (epochs - 1) * epoch + min(interval, epoch)
    if steps * trainer.accumulate_grad_batches < first < math.inf:
        raise UserValueError(
            f"model.lr_scheduler waits for validations, and the first would follow micro-batch {first:,.0f}, after the "
            f"run's {steps:,} optimizer steps. Lower trainer.val_check_interval or trainer.check_val_every_n_epoch."
        )


def follow_validation(trainer: L.Trainer) -> None:
    """Let schedules on a plateau see the values of a validation; that before the first step does not count."""
    if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
        return
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, Plateau):
            monitor = getattr(config.scheduler, "monitor", "")
            if monitor not in trainer.callback_metrics:
                raise UserValueError(
                    f"model.lr_scheduler.monitor is {monitor!r}, which this validation has not logged."
                )
            config.scheduler.step(float(trainer.callback_metrics[monitor]))
