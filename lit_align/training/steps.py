"""When an optimizer step was taken, in the middle of accumulation or not."""

import lightning as L


def at_step(trainer: L.Trainer) -> bool:
    """In `on_train_batch_end`: whether an optimizer step was just taken.

    True on all ranks alike and once a step, whatever the accumulation is.
    """
    return not trainer.fit_loop._should_accumulate()


def at_logged_step(trainer: L.Trainer) -> bool:
    """In `on_train_batch_end`: whether an optimizer step was just taken whose number the Trainer logs."""
    every_n_steps: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set in Trainer's constructor
    return at_step(trainer) and trainer.global_step % every_n_steps == 0
