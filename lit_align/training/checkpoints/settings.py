"""Settings of a run by the names of their options, and what becomes of each that differs when the run resumes."""

import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lit_align.common.manifest import Change, changes
from lit_align.objectives import Objective

OnResume = Literal["keep", "take"]
Outcome = Literal["taken", "kept", "refused"]
OPTIMIZER, SCHEDULER, CALLBACKS = "model.optimizer", "model.lr_scheduler", "trainer.callbacks."
COMPENSATES = "model.compensate_rounding"
OWN = ("caption_dropout", "validation_draws", "float32_matmul", "attention", "compensate_rounding")
# Not compared here: where a run logs; what `check_beginning` compares; and what decides the pairs and their order,
# which the data module compares by content.
ELSEWHERE = (
    *("trainer.logger", "trainer.default_root_dir", "ckpt_path", "weights_only", "config", "seed_everything"),
    *("model.seed", "model.objective", "model.backbone.repo", "model.backbone.lora", "model.optimizer_on_resume"),
    *("data.seed", "data.batch_size", "data.shuffle_window", "data.resolution", "data.aspect_buckets", "data.crop"),
    *("data.flip_probability", "data.vote", "data.scorers", "data.train_shards", "data.train_scores"),
)
WHOLE = ("trainer.logger", "model.backbone.lora", "data.vote", "data.scorers")  # with all names below them
TO_TAKE = "--model.optimizer_on_resume take"


class Changed(NamedTuple):
    """A setting that differs from the run's own, and what becomes of it."""

    name: str
    was: Any
    now: Any
    outcome: Outcome
    why: str

    def __str__(self) -> str:
        return f"{self.name} was {self.was!r}, is {self.now!r}: {self.outcome}{self.why and f', {self.why}'}"


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each value of a config as the name of its option, its container and its key there.

    A class is a value of its own, and its arguments stand below it, as on the command line.
    """
    found = enumerate(settings) if isinstance(settings, list) else settings.items()
    names = _class_names(settings) if isinstance(settings, list) else {}
    for key, value in found:
        name = f"{prefix}{names.get(key, key)}"
        if _is_class(value):
            yield name, value, "class_path"
            for arguments in ("init_args", "dict_kwargs"):
                yield from leaves(value.get(arguments) or {}, f"{name}.")
        elif (isinstance(value, Mapping) and value) or (isinstance(value, list) and any(map(_is_class, value))):
            yield from leaves(value, f"{name}.")
        else:
            yield name, settings, key


def _is_class(value: Any) -> bool:
    return isinstance(value, Mapping) and "class_path" in value


def _class_names(values: list[Any]) -> dict[int, str]:
    """Name the classes of a list; the second of a class is `Name#2`."""
    names, seen = {}, list[str]()
    for number, value in enumerate(values):
        name = str(value["class_path"]).rsplit(".", 1)[-1] if _is_class(value) else str(number)
        seen.append(name)
        names[number] = name if seen.count(name) == 1 else f"{name}#{seen.count(name)}"
    return names


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a config to values by the names of their options; of a class path the last word counts."""
    return {
        name: str(container[key]).rsplit(".", 1)[-1] if key == "class_path" else container[key]
        for name, container, key in leaves(config)
    }


def put(config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Set values of a config by the names of their options."""
    for name, container, key in list(leaves(config)):
        if name in values:
            container[key] = values[name]


def described(name: str, thing: Any) -> dict[str, Any]:
    """Describe an object by its class and those arguments of its constructor that it keeps under their names."""
    arguments = {one: getattr(thing, one) for one in inspect.signature(type(thing)).parameters if hasattr(thing, one)}
    found = {name: type(thing).__name__, **_plain({f"{name}.{one}": value for one, value in arguments.items()})}
    for one, value in arguments.items():
        if isinstance(value, Objective):  # of a wrapper
            found |= described(f"{name}.{one}", value)
    return found


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the settings that a checkpoint can hold: numbers, strings and lists of them; of an enum its value."""
    values = {name: value.value if isinstance(value, Enum) else value for name, value in settings.items()}
    return {name: value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool) or isinstance(value, np.number)


def made_in_python(module: Any) -> dict[str, Any]:
    """Describe the settings of a run that was made without a config, as far as its objects tell them."""
    own = {f"model.{name}": getattr(module, name) for name in OWN}
    own |= {"model.reference_errors": module.reference.folder and str(module.reference.folder)}
    own |= {"model.non_finite": module.skipping.policy, "model.skip_limit": module.skipping.limit}
    own |= described("model.objective", module.objective)
    return {**own, **_optimizer_settings(module.optimizer, module.lr_scheduler), **_trainer_settings(module.trainer)}


def _optimizer_settings(make: OptimizerCallable, schedule: LRSchedulerCallable | None) -> dict[str, Any]:
    probe = make([torch.nn.Parameter(torch.zeros(1, 1))])  # a matrix: some optimizers take nothing else
    numbers = _plain({f"{OPTIMIZER}.{name}": value for name, value in probe.param_groups[0].items()})
    found = {OPTIMIZER: type(probe).__name__, **numbers, SCHEDULER: None}
    if schedule is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the probe takes no steps
            found |= described(SCHEDULER, schedule(probe))
        found.pop(f"{SCHEDULER}.last_epoch", None)
    return found


def _trainer_settings(trainer: L.Trainer) -> dict[str, Any]:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set in Trainer's constructor
    names = ["gradient_clip_val", "gradient_clip_algorithm", "precision", "max_steps"]
    if not any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        names.append("accumulate_grad_batches")  # otherwise it changes in the run
    settings = {f"trainer.{name}": getattr(trainer, name) for name in names}
    for callback in callbacks:
        settings |= described(f"{CALLBACKS}{type(callback).__name__}", callback)
    return _plain(settings)


def compare(
    began: Mapping[str, Any], now: Mapping[str, Any], on_resume: OnResume, saved: Collection[str] | None = None
) -> list[Changed]:
    """Compare the settings of a run with those that it is to go on with.

    Args:
        began: the run's own settings.
        now: the new ones.
        on_resume: see `RunRecord`.
        saved: names of the optimizer's numbers in the checkpoint, which come back; none if they are not known.
    """
    there = [change for change in changes(began, now) if not _elsewhere(change.name)]
    return [Changed(one.name, one.was, one.now, *_judge(one, on_resume, saved)) for one in there]


def _elsewhere(name: str) -> bool:
    return name in ELSEWHERE or name.startswith(tuple(f"{whole}." for whole in WHOLE))


def _judge(change: Change, on_resume: OnResume, saved: Collection[str] | None) -> tuple[Outcome, str]:
    """Decide what becomes of a changed setting: the table of docs/training.md, section Resume."""
    name, was, now = change
    if name == OPTIMIZER or (name == COMPENSATES and bool(was) != bool(now)):  # None before there was the option
        return "refused", "the checkpoint holds the state of the other optimizer"
    if name == "trainer.accumulate_grad_batches":
        return "refused", "its steps would be of other pairs"
    if name == "model.reference_errors" and (was is None or now is None):
        return "refused", "its steps would be of other noise"
    if name.startswith(f"{OPTIMIZER}."):
        if saved is not None and name.removeprefix(f"{OPTIMIZER}.").split(".")[0] not in saved:
            return "taken", "no checkpoint holds it"
        return ("taken", "") if on_resume == "take" else ("kept", f"unless {TO_TAKE} asks for the new value")
    if name == SCHEDULER or name.startswith(f"{SCHEDULER}."):
        if on_resume == "take":
            return "taken", ""
        if name == SCHEDULER or was is None or now is None or isinstance(was, str):
            return "refused", f"the checkpoint holds the state of the other schedule; {TO_TAKE} follows the new one"
        return "kept", f"unless {TO_TAKE} asks for the new value"
    return "taken", ""


def give_to_callbacks(callbacks: Sequence[L.Callback], taken: Sequence[Changed]) -> None:
    """Set settings that were taken on callbacks that have put their own back from the checkpoint, as EarlyStopping."""
    seen: dict[str, int] = {}
    for callback in callbacks:
        kind = type(callback).__name__
        seen[kind] = seen.get(kind, 0) + 1
        prefix = f"{CALLBACKS}{kind}{'' if seen[kind] == 1 else f'#{seen[kind]}'}."
        for one in taken:
            argument = one.name.removeprefix(prefix)
            if argument != one.name and getattr(callback, argument, one.now) == one.was:
                setattr(callback, argument, one.now)
