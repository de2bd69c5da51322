"""Length of a run, and the learning rates of its steps."""

from collections.abc import Iterator

import lightning as L
from jsonargparse import Namespace

from lit_align.training.lr_schedulers import Plateau, check_monitor, make_scheduler, monitored, rate_lines
from lit_align.training.module import AlignmentModule
from lit_align.training.steps import accumulation


def accumulations(trainer: L.Trainer | None) -> dict[int, int]:
    """Return micro-batches per step by their first epochs, where a callback sets them."""
    changing = None if trainer is None else accumulation(trainer)
    return {} if changing is None else dict(changing.scheduling)


def count_steps(wanted: Namespace, accumulated: int, batches: int) -> int:
    """Count a run's optimizer steps; -1 where it has no end, or where the batches of an epoch are unknown.

    Args:
        wanted: options of the Trainer.
        accumulated: micro-batches of a step.
        batches: of an epoch on each device; 0 where unknown.
    """
    steps: int = wanted.max_steps
    if steps < 0 and batches and wanted.max_epochs not in (None, -1):
        steps = wanted.max_epochs * -(-batches // accumulated)
    return steps


def length_line(wanted: Namespace, steps: int, pairs: int, epoch_steps: int) -> str:
    """Describe the length of a run.

    Args:
        wanted: options of the Trainer.
        steps: optimizer steps; -1 where unknown.
        pairs: of a step; 0 where it changes between epochs.
        epoch_steps: steps of an epoch; 0 where unknown.
    """
    if steps < 0:
        return f"until       {wanted.max_epochs} epochs"
    line = f"until       {steps:,} optimizer steps"
    if not pairs:
        return line
    epochs = f", {steps / epoch_steps:,.1f} epochs" if epoch_steps else ""
    return f"{line}, {steps * pairs:,} pairs{epochs}"


def schedule_lines(module: AlignmentModule, steps: int, validates: bool) -> Iterator[str]:
    """Make the learning-rate schedule, follow it through the run, and describe it.

    Args:
        module: of shapes only.
        steps: of the run; -1 where unknown.
        validates: whether the run has validations.

    Raises:
        UserValueError: where `fit` would.
    """
    if module.lr_scheduler is None:
        return
    trial = module.optimizer([next(iter(module.backbone.trainable_parameters().values()))])
    scheduler = make_scheduler(module.lr_scheduler, trial)
    if isinstance(scheduler, Plateau):
        check_monitor(scheduler, monitored(module.val_metrics.names), True, validates)
    yield from (line.strip() for line in rate_lines(module.optimizer, module.lr_scheduler, max(steps, 1)))
