"""What a checkpoint must hold, and what it says of how far the run is."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lit_align.user_errors import UserValueError

log = logging.getLogger(__name__)


def check_weights(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not exactly those which a module trains.

    Raises:
        ValueError: if some are missing, unknown or of another shape.
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


def check_beginning(began: Mapping[str, Any], now: Mapping[str, Any], non_finite: str) -> None:
    """Refuse to continue a run as another one; another place of the pretrained pipeline is told alone.

    Args:
        began: what the checkpoint says of its run: `seed`, `objective`, `fault` and the backbone's `export_info`.
        now: the same of this run.
        non_finite: this run's policy.

    Raises:
        ValueError: if seed, objective or backbone are others, or if the run was ended at this checkpoint's step.
    """
    seed, objective = now["seed"], now["objective"]
    if began.get("seed", seed) != seed:
        raise UserValueError(
            f"The run began with seed_everything {began['seed']}, not {seed}; its noise could not go on exactly. "
            f"Resume with --seed_everything {began['seed']}."
        )
    if began.get("objective", objective) != objective:
        raise UserValueError(
            f"The run began with the objective {began['objective']}, not {objective}. Resume with that; or export its "
            f"weights, put them in the place of the pipeline's UNet, and begin a run with {objective} there."
        )
    for then, here, what in _differences(began, now):
        raise UserValueError(
            f"The run began with {what} {then}, not {here}. Resume with the model.backbone that the run began with."
        )
    if began.get("fault") and non_finite == "stop":
        raise UserValueError(
            f"The run was ended at this checkpoint's step: {began['fault']}. Resume from an earlier checkpoint, or "
            "leave such steps out with --model.non_finite skip."
        )
    if began.get("repo", now["repo"]) != now["repo"]:
        log.warning(
            "The run began with model.backbone.repo %s, and goes on with %s: their frozen weights must be the same.",
            began["repo"],
            now["repo"],
        )


def _differences(began: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[Any, Any, str]]:
    """What was, what is, and its name, where backbones differ though their weights have the same shapes."""
    for name in ("pipeline", "prediction_type", "lora"):
        if name in began and began[name] != now[name]:
            yield began[name], now[name], name
    then, here = began.get("denoiser_config", {}), now["denoiser_config"]
    for name in then:
        if then[name] != here.get(name):
            yield then[name], here.get(name), f"the UNet's {name}"


def rewind_to_step(loops: dict[str, Any], accumulate_grad_batches: int, batches: float) -> int:
    """Count only the micro-batches that an optimizer step has used, and return how many do not count any more.

    A checkpoint may be written in the middle of an accumulation (at a time interval, on an error). It holds no
    gradients, so the resumed run must see the pairs of the unfinished step again.

    Args:
        loops: the Trainer's state, see `Trainer.fit_loop`; it is changed.
        accumulate_grad_batches: micro-batches per step; an epoch's last step may have fewer.
        batches: of an epoch.
    """
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    current, total = progress["current"], progress["total"]
    done = current["processed"]  # one that is only begun is begun again
    unused = 0 if done >= batches else done % accumulate_grad_batches
    back = {name: current[name] - (done - unused) for name in ("ready", "started", "processed")}
    # `completed` stays one behind where it was: by that Lightning knows that the batch's end was under way.
    back["completed"] = unused
    for counters in (current, total):
        for name, count in back.items():
            counters[name] -= count
    return unused
