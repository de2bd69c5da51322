"""Optimizer steps: how many a run has, and what `on_train_batch_end` of each micro-batch asks before it acts."""

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lit_align.internals import is_accumulating


def at_step(trainer: L.Trainer) -> bool:
    """Whether this micro-batch completed an optimizer step: true once per step, on all ranks, with any accumulation."""
    return not is_accumulating(trainer)


def at_every(trainer: L.Trainer, every_n_steps: int) -> bool:
    """Whether this micro-batch completed an optimizer step whose number is a multiple of N; never where N is 0."""
    return every_n_steps > 0 and at_step(trainer) and trainer.global_step % every_n_steps == 0


def at_logged_step(trainer: L.Trainer) -> bool:
    """Whether this micro-batch completed an optimizer step that the Trainer logs."""
    return at_every(trainer, trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set in Trainer's constructor


def total_steps(trainer: L.Trainer) -> int | None:
    """Optimizer steps of the whole fit, or None where it has no end."""
    most = trainer.max_steps if trainer.max_steps > 0 else None
    if trainer.max_epochs == -1:
        return most
    if (changing := accumulation(trainer)) is None:
        return int(trainer.estimated_stepping_batches)
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()  # as `estimated_stepping_batches` does
    counts = [changing.get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs or 0)]
    steps = sum(-(-int(trainer.num_training_batches) // count) for count in counts)
    return steps if most is None else min(steps, most)


def total_epochs(trainer: L.Trainer) -> int | None:
    """Epochs of the whole fit, a begun one included, or None where it has no end."""
    most, steps = trainer.max_epochs if trainer.max_epochs not in (None, -1) else None, total_steps(trainer)
    if steps is None:
        return most
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()  # as `estimated_stepping_batches` does
    batches, changing = trainer.num_training_batches, accumulation(trainer)
    if not 0 < batches < float("inf"):
        return most
    epochs = 0
    while steps > 0:
        each = trainer.accumulate_grad_batches if changing is None else changing.get_accumulate_grad_batches(epochs)
        steps -= -(-int(batches) // each)
        epochs += 1
    return epochs if most is None else min(epochs, most)


def accumulation(trainer: L.Trainer) -> GradientAccumulationScheduler | None:
    """The callback that sets the micro-batches of a step by epoch, in place of `accumulate_grad_batches`."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set in Trainer's constructor
    return next((callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)), None)


def accumulated(trainer: L.Trainer) -> int:
    """Count the micro-batches of a step in this epoch, also before Lightning has set them."""
    changing = accumulation(trainer)
    return (
        trainer.accumulate_grad_batches
        if changing is None
        else changing.get_accumulate_grad_batches(trainer.current_epoch)
    )


def restore_accumulation(trainer: L.Trainer) -> None:
    """Set the micro-batches of a step before the first one: Lightning does so only where an epoch begins."""
    trainer.accumulate_grad_batches = accumulated(trainer)
