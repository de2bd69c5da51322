"""Checks before a run resumes: the checkpoint holds this module's weights, and the run began with these settings."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from lit_align.backbones.lora import LoRA
from lit_align.common.manifest import differences, in_words
from lit_align.objectives import Objective
from lit_align.user_errors import UserValueError

log = logging.getLogger(__name__)


def check_weights(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not exactly those that a module trains.

    Raises:
        UserValueError: if weights are missing, unknown or of another shape.
    """
    missing, foreign = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or foreign:
        raise UserValueError(
            f"The checkpoint does not fit this model: {len(missing)} trained weights are missing "
            f"({', '.join(missing[:2]) or 'none'}), {len(foreign)} are unknown "
            f"({', '.join(foreign[:2]) or 'none'}). Resume with the model.backbone that the run began with "
            "(full or LoRA, its rank and targets), and with an objective that has a reference if the run's had one."
        )
    other = sorted(name for name, weight in wanted.items() if weight.shape != found[name].shape)
    if other:
        first = other[0]
        raise UserValueError(
            f"The checkpoint does not fit this model: {len(other)} weights have another shape, such as {first}: "
            f"{tuple(found[first].shape)} in the checkpoint, {tuple(wanted[first].shape)} here. Resume with the "
            "model.backbone that the run began with (its repo, and the LoRA's rank)."
        )


def beginning(module: Any) -> dict[str, Any]:
    """Return the facts of a module that a run can never change."""
    objective = {"objective": module.objective.name(), "objective_form": module.objective.form}
    return {"seed": module.seed, **objective, **module.backbone.export_info()}


def check_beginning(began: Mapping[str, Any], now: Mapping[str, Any], non_finite: str) -> None:
    """Refuse to resume with another seed, objective or backbone. A different `repo` only logs a warning.

    Args:
        began: the checkpoint's record of its run: `seed`, `objective`, `fault` and the backbone's `export_info`.
        now: `seed`, `objective` and `export_info` of this run.
        non_finite: this run's policy.

    Raises:
        UserValueError: if a setting differs, or if the run was stopped at this checkpoint's step.
    """
    seed, objective = now["seed"], now["objective"]
    if began.get("seed", seed) != seed:
        raise UserValueError(
            f"The run began with seed_everything {began['seed']}, not {seed}; its noise could not continue exactly. "
            f"Resume with --seed_everything {began['seed']}."
        )
    if began.get("objective", objective) != objective:
        raise UserValueError(
            f"The run began with the objective {began['objective']}, not {objective}. Resume with that; or export its "
            f"weights, replace the pipeline's UNet by them, and begin a run with {objective} there."
        )
    if changed := _backbone_differences(began, now):
        raise UserValueError(
            f"The run began with another backbone: {in_words(changed)}. Resume with the model.backbone that the run "
            "began with."
        )
    if began.get("fault") and non_finite == "stop":
        raise UserValueError(
            f"The run was stopped at this checkpoint's step: {began['fault']}. Resume from an earlier checkpoint, or "
            "skip such steps with --model.non_finite skip."
        )
    if began.get("repo", now["repo"]) != now["repo"]:
        log.warning(
            "The run began with model.backbone.repo %s, and resumes with %s: their frozen weights must be equal.",
            began["repo"],
            now["repo"],
        )


def check_form(began: Mapping[str, Any], objective: Objective) -> None:
    """Refuse to resume a run whose objective had another formula.

    Raises:
        UserValueError: saying how it differs.
    """
    form, settings = began.get("objective_form", 1), began.get("run", {}).get("settings", {})
    if changed := objective.changed_since(form, settings):
        raise UserValueError(
            f"The run began with an earlier form of {objective.name()}: {changed}, and its loss would jump. Finish it "
            "with the commit of lit-align that began it, or export its weights and begin a run from them."
        )


def _backbone_differences(began: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the settings of the backbone that differ although no shape does; unknown settings are skipped."""
    old = {name: began[name] for name in ("pipeline", "prediction_type", "lora", "denoiser_config") if name in began}
    config = {name: now["denoiser_config"].get(name) for name in old.get("denoiser_config", {})}
    if old.get("lora") is not None:
        old["lora"] = asdict(LoRA(**old["lora"]))  # checkpoints of older versions lack settings that had one value
    return differences(old, {name: config if name == "denoiser_config" else now[name] for name in old})
