"""Read a pipeline's noise schedule from its scheduler's config, and refuse what the training does not do."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import DDPMScheduler

from lit_align.backbones.loading.model_configs import refuse_unknown
from lit_align.common.hub import ModelLocation
from lit_align.user_errors import UserValueError

# Samplers of models that were trained on DDPM's forward process; all others belong to another training.
CLASSES = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # of betas, which our samplers know too
SAMPLING = (  # keys that diffusers keeps from another sampler, or wrote in older versions
    "denoise_final",
    "noise_sampler_seed",
    "original_inference_steps",
    "predict_epsilon",
    "tensor_format",
    "timestep_scaling",
)
FORWARD_PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
REPLACE = "Take the base model's scheduler/scheduler_config.json, or choose another repo."


def load_scheduler(repo: str, revision: str | None, listed: str | None) -> Any:
    """Read a noise schedule into a DDPMScheduler (not typed), with the defaults of the own scheduler of the pipeline.

    Args:
        repo: hub id or local folder of the pipeline.
        revision: branch, tag or commit of `repo`.
        listed: class of the scheduler in `model_index.json`; None if it has none.

    Raises:
        UserValueError: if the model was trained in a way that the training does not continue.
    """
    location = ModelLocation(repo, "scheduler", revision)
    config = dict(DDPMScheduler.load_config(repo, subfolder="scheduler", revision=revision))
    where = f"{location}/scheduler_config.json"
    for name in (listed, config.get("_class_name")):
        _check_class(where, name)
    own = _defaults(str(config.get("_class_name") or listed or "DDPMScheduler"))
    usual = _defaults("DDPMScheduler")
    config |= {k: own[k] for k in FORWARD_PROCESS if k not in config and own.get(k, usual[k]) != usual[k]}
    _check(where, usual | config)
    return DDPMScheduler.from_config(config)


def _check_class(where: str, name: str | None) -> None:
    if name is not None and name not in CLASSES:
        raise UserValueError(
            f"{where}: the scheduler is {name}, whose models are not trained on the noise schedule of DDPM, as "
            f"lit-align does it. {REPLACE}"
        )


def _defaults(name: str) -> dict[str, Any]:
    """Return the arguments of a scheduler's constructor with their defaults."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "self"}


def _check(where: str, config: Mapping[str, Any]) -> None:
    """Refuse values that decide how a model was trained, and that the training does not do."""
    steps, betas, kind = (config.get(name) for name in ("num_train_timesteps", "trained_betas", "prediction_type"))
    schedule, variance = config.get("beta_schedule"), str(config.get("variance_type", ""))
    faults = {
        f"beta_schedule is {schedule!r}; known are {', '.join(SCHEDULES)}": schedule not in SCHEDULES and betas is None,
        "trained_betas has another length than num_train_timesteps": betas is not None and len(betas) != steps,
        f"prediction_type is {kind!r}; supported are epsilon and v_prediction": kind not in ("epsilon", "v_prediction"),
        "predict_epsilon is false, so that the model predicts the image": config.get("predict_epsilon") is False,
        f"variance_type is {variance!r}; the training learns no variance": variance.startswith("learned"),
        "use_flow_sigmas is true, which is flow matching": bool(config.get("use_flow_sigmas")),
        "timestep_type is 'continuous'": config.get("timestep_type", "discrete") != "discrete",
        "rescale_betas_zero_snr is true with prediction_type 'epsilon', which cannot be sampled from pure noise": (
            bool(config.get("rescale_betas_zero_snr")) and kind == "epsilon"
        ),
    }
    if found := next((fault for fault, holds in faults.items() if holds), None):
        raise UserValueError(f"{where}: {found}. {REPLACE}")
    refuse_unknown(where, config, {key for name in CLASSES for key in _defaults(name)}.union(SAMPLING))
