"""Refuse options and callbacks of the Trainer that would do nothing, something else, or fail in the middle of a run."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lit_align.user_errors import UserValueError

LEAST = {  # smallest values that mean something; Lightning takes smaller ones without a word
    "accumulate_grad_batches": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
    "reload_dataloaders_every_n_epochs": 0,
}
AVERAGES = "averages a copy of the whole model, but lit-align trains and saves only a part of it"
FINDERS = "changes the run's settings in steps before the run, and needs settings that lit-align does not have"


def check_options(trainer: Any) -> None:
    """Refuse values of the Trainer's options that cannot be meant.

    Args:
        trainer: config of the Trainer.

    Raises:
        UserValueError: that names the option.
    """
    for name, least in LEAST.items():
        value = trainer.get(name)
        if value is not None and value < least:
            raise UserValueError(f"trainer.{name} is {value}; it must be at least {least}.")
    if trainer.min_steps is not None and 0 <= trainer.max_steps < trainer.min_steps:
        raise UserValueError(
            f"trainer.min_steps is {trainer.min_steps}, but trainer.max_steps {trainer.max_steps} ends the run before."
        )


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks of Lightning that do not work with a module whose encoders are loaded later and not saved.

    Raises:
        UserValueError: that names the callback.
    """
    for callback in callbacks:
        average = isinstance(callback, WeightAveraging | StochasticWeightAveraging)
        if average or isinstance(callback, BatchSizeFinder | LearningRateFinder):
            raise UserValueError(
                f"trainer.callbacks: {type(callback).__name__} {AVERAGES if average else FINDERS}. Take it out of "
                "trainer.callbacks."
            )
