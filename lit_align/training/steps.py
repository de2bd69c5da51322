"""Once per optimizer step: what `on_train_batch_end`, called after each micro-batch, asks before it acts."""

import lightning as L

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
