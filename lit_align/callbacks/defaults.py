"""The callbacks that every run of the command line has."""

from importlib import import_module
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from lit_align.callbacks.chosen_error_rise import ChosenErrorRise
from lit_align.callbacks.due_validation import DueValidation
from lit_align.callbacks.known_pairs import KnownPairs
from lit_align.callbacks.preemption import Preemption
from lit_align.callbacks.start_banner import StartBanner
from lit_align.callbacks.step_progress import StepProgress
from lit_align.callbacks.superseded_checkpoints import SupersededCheckpoints
from lit_align.callbacks.throughput import Throughput
from lit_align.training.checkpoints.run_folder import RunFolder


def default_callbacks() -> list[L.Callback]:
    """Make the callbacks in the order in which they act."""
    watching = [KnownPairs(), StartBanner(), Throughput(), StepProgress(), ChosenErrorRise()]
    return [RunFolder(), *watching, SupersededCheckpoints(), DueValidation(), Preemption()]


def without_rivals(defaults: list[L.Callback], trainer: Any) -> list[L.Callback]:
    """Leave out default callbacks that the Trainer's config replaces or disables.

    Args:
        defaults: see `default_callbacks`.
        trainer: config of the Trainer: a progress bar, or a callback of the same class, replaces ours.
    """
    named = trainer.callbacks or []
    found = [_named(callback.class_path) for callback in (named if isinstance(named, list) else [named])]
    kinds = [kind for kind in found if isinstance(kind, type)]  # others are functions that make a callback
    bar = trainer.enable_progress_bar is not False and not trainer.barebones
    bar = bar and not any(issubclass(kind, ProgressBar) for kind in kinds)
    kept = [default for default in defaults if not any(issubclass(kind, type(default)) for kind in kinds)]
    return [default for default in kept if bar or not isinstance(default, StepProgress)]


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
