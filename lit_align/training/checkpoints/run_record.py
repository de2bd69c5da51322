"""What a checkpoint records of its run, and how a resumed run follows it."""

import uuid
import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lit_align.training.checkpoints.settings import (
    OPTIMIZER,
    SCHEDULER,
    Changed,
    OnResume,
    compare,
    give_to_callbacks,
    made_in_python,
)
from lit_align.user_errors import UserValueError


class RunRecord:
    """The settings of a run, those that it kept or took when it resumed, and a name that is the run's alone.

    Args:
        on_resume: whether a resumed run keeps the numbers of its optimizer and schedule, or takes the new ones.
    """

    def __init__(self, on_resume: OnResume) -> None:
        if on_resume not in ("keep", "take"):
            raise UserValueError(f"model.optimizer_on_resume is {on_resume!r}; it must be keep or take.")
        self.on_resume = on_resume
        self.name = uuid.uuid4().hex
        self.fork = False  # whether the run goes on from a checkpoint of another run, in a folder of its own
        self.config: Mapping[str, Any] | None = None  # settings by option, where the command line made the run
        self.kept: dict[str, Any] = {}  # the run's own values in place of the config's
        self.taken: list[Changed] = []
        self.history: list[str] = []  # settings that changed, with the step
        self._catch_up: int | None = None  # steps of the schedule before the resume, where new numbers are taken

    def settings(self, module: Any) -> dict[str, Any]:
        """Return the settings that the run trains with: those of the config, or those that were made in Python."""
        return {**(made_in_python(module) if self.config is None else self.config), **self.kept}

    def save(self, module: Any) -> dict[str, Any]:
        """Return the record for a checkpoint."""
        settings = {name: list(v) if isinstance(v, tuple) else v for name, v in self.settings(module).items()}
        facts = {"name": self.name, "from_config": self.config is not None, "history": self.history}
        return {**facts, "settings": settings}

    def resume(self, checkpoint: dict[str, Any], module: Any) -> None:
        """Compare this run's settings with the checkpoint's, and say what becomes of each that differs.

        Raises:
            UserValueError: if the run cannot go on with one of them.
        """
        now = self.save(module)["settings"]
        record = checkpoint.get("lit_align", {}).get("run")
        if unknown := record is None:
            rank_zero_info(
                "The checkpoint does not say with which settings its run began: only its optimizer's are compared."
            )
            began = _optimizer_settings(checkpoint) | _other_schedule(checkpoint, now)
            record = {"name": self.name, "history": [], "from_config": None, "settings": began}
        self.name = self.name if self.fork else record["name"]
        self.history, self.kept = list(record["history"]), {}
        began = record["settings"]
        if record["from_config"] != (self.config is not None):  # what is made in Python knows fewer of its settings
            began, now = ({name: values[name] for name in began.keys() & now.keys()} for values in (began, now))
        found = compare(began, now, self.on_resume, _saved_numbers(checkpoint))
        _refuse(found)
        self.kept = {one.name: one.was for one in found if one.outcome == "kept"}
        self.taken = taken = [one for one in found if one.outcome == "taken"]
        step = int(checkpoint["global_step"])
        self.history += [f"step {step:,}: {one.name} was {one.was!r}, is {one.now!r}" for one in taken]
        numbers = any(one.name.startswith((OPTIMIZER, SCHEDULER)) for one in taken)
        if self.on_resume == "take" and (numbers or unknown):  # the numbers of an old schedule are not known
            self._catch_up = _steps(checkpoint)
            checkpoint["lr_schedulers"] = []  # of a schedule that may be of another class
        if found:
            lines = "".join(f"\n  {one}" for one in found)
            rank_zero_info(f"The run goes on from step {step:,} with settings that differ from its own:{lines}")

    def take(self, module: Any) -> None:
        """Let what was taken act, now that the checkpoint's states are restored.

        A new schedule leads as if it had from the first step on.
        """
        give_to_callbacks(module.trainer.callbacks, self.taken)
        if self._catch_up is None:
            return
        (optimizer,), configs = module.trainer.optimizers, module.trainer.lr_scheduler_configs
        twin = module.optimizer([parameter for group in optimizer.param_groups for parameter in group["params"]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the twin takes no steps
            follower = None if module.lr_scheduler is None else module.lr_scheduler(twin)
            for _ in range(0 if follower is None or isinstance(follower, ReduceLROnPlateau) else self._catch_up):
                follower.step()  # type: ignore[union-attr]
        for group, new in zip(optimizer.param_groups, twin.param_groups, strict=True):
            group.update({name: value for name, value in new.items() if name != "params"})
        for config in configs:
            config.scheduler.load_state_dict(follower.state_dict())  # type: ignore[union-attr]
        self._catch_up = None


def _refuse(found: list[Changed]) -> None:
    refused = [str(one) for one in found if one.outcome == "refused"]
    if refused:
        raise UserValueError(
            f"The run cannot go on with other settings than its own. {'; '.join(refused)}. Resume with the old values, "
            "or export the weights and begin a new run from them."
        )


def _saved_numbers(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the numbers of the optimizer that a checkpoint holds; None of a sharded one."""
    states = checkpoint.get("optimizer_states")
    group = states[0]["param_groups"][0] if states else None
    return group and {name: value for name, value in group.items() if name != "params"}


def _optimizer_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of the optimizer in a checkpoint without a record as settings."""
    numbers = _saved_numbers(checkpoint) or {}
    numbers |= {"lr": numbers["initial_lr"]} if "initial_lr" in numbers else {}  # before its schedule
    return {f"{OPTIMIZER}.{name}": list(v) if isinstance(v, tuple) else v for name, v in numbers.items()}


def _other_schedule(checkpoint: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schedule of a checkpoint without a record where only one of both runs has one."""
    had = bool(checkpoint.get("lr_schedulers"))
    return {} if had == (now.get(SCHEDULER) is not None) else {SCHEDULER: "a schedule" if had else None}


def _steps(checkpoint: Mapping[str, Any]) -> int:
    """Read how often the run's schedule has been stepped; without one, as often as the optimizer."""
    states = checkpoint["lr_schedulers"]
    return int(states[0].get("last_epoch", checkpoint["global_step"]) if states else checkpoint["global_step"])
