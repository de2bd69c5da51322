"""`lit-align test`: how often a model's images win against those of its base, from the same noise."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import lit_align
from lit_align.backbones.base import Precision
from lit_align.backbones.sampling import Sampler
from lit_align.commands.evaluate.comparison import Contest, Judge
from lit_align.commands.evaluate.publish import BASE, publish, stamp
from lit_align.commands.shared.models import (
    ModelSpec,
    Sampling,
    check_numbers,
    default_guidance_scale,
    default_precision,
    find_base,
    native_size,
    spec_of,
)
from lit_align.commands.shared.process_group import ALONE, join_process_group
from lit_align.common.lock import folder_turn
from lit_align.common.manifest import read_manifest, refuse_differences
from lit_align.evaluation.noise import prompt_seed
from lit_align.evaluation.prompts import Prompts, read_prompts
from lit_align.evaluation.report.page import FORMAT
from lit_align.evaluation.tables import compare_all
from lit_align.evaluation.win_rates import check_tolerance
from lit_align.scoring.presets import load_scorers, scorer_names
from lit_align.user_errors import UserValueError

RESULTS = "results.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a model: it becomes a folder's
INCIDENTAL = ("output", "cache", "batch_size", "accelerator", "devices")  # options that change no result


# Long for its options alone: they are the command line.
def test(
    models: dict[str, str],
    output: Path,
    prompts: str,
    scorers: str | list[str],
    base: str | None = None,
    presets: Path | None = None,
    tolerances: dict[str, float] | None = None,
    seed: int = 0,
    sampler: Sampler = "euler",
    steps: int = 50,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    precision: Precision | None = None,
    batch_size: int = 4,
    prompt_column: str | None = None,
    prompt_limit: int | None = None,
    vae_repo: str | None = None,
    variant: str | None = None,
    cache: Path = Path("runs/test_cache"),
    accelerator: str = "auto",
    devices: int | str = "auto",
) -> None:
    """Draw each prompt with all models and their base, from the same noise, and count whose images score higher.

    The noise of an image depends on its prompt and the seed alone. A killed run goes on where it stopped; under
    torchrun or SLURM, or with more than one device, the processes share the prompts. What the base draws, and its
    scores, are kept for the next model.

    Args:
        models: by the names that results are to use: checkpoint of lit-align fit, UNet folder or LoRA, or another
            pipeline, hub id or local folder.
        output: folder for `results.json`, the images and the report.
        prompts: file of prompts: `.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`, or text, one a line; or one of our own
            sets, `emoji` or `general`. Repeated ones are left out.
        scorers: names, as a list or separated by commas.
        base: pipeline, hub id or local folder, that models are compared with, and whose UNet they were trained from;
            none: the one that checkpoints name.
        presets: YAML file that says what the scorers are; none: the one of lit-align.
        tolerances: by scorer, differences of scores up to which a prompt is a tie; none: only equal scores are.
        seed: of the noise, together with the prompt; 0 is a seed like any other.
        sampler: `euler`, `ddim` or `dpm++` (second order, 2M), each with the schedule of the model's pipeline.
        steps: of the sampler, per image.
        guidance_scale: of classifier-free guidance, 1 turns it off; none: 5 for SDXL, 7.5 for Stable Diffusion, by the
            base.
        height: pixels; none: the models' own.
        width: pixels; none: the models' own.
        precision: of the UNets; none: fp16 on a GPU, fp32 on the CPU. The VAE computes in fp32.
        batch_size: images drawn and scored at a time on a GPU, where rounding depends on it. On the CPU each is drawn
            alone, so that results are the same to the last bit whatever the batch size and the number of processes.
        prompt_column: where prompts are in a table or in objects; none: `prompt`, or as benchmarks call it.
        prompt_limit: at most so many prompts, evenly spread over the file.
        vae_repo: hub id or local folder of another VAE.
        variant: weight files' variant in the pipelines, such as `fp16`.
        cache: folder of images and scores by what drew them and how; it may be deleted at any time.
        accelerator: `auto`, `cpu` or `gpu`. The CPU takes one thread, or as many as OMP_NUM_THREADS says: results
            depend on their number in the last digits.
        devices: of one machine, a number, or `auto` for all; torchrun and SLURM say it themselves.

    Raises:
        ValueError: if the options do not fit each other, or `output` holds results of others.
    """
    options = locals().copy()
    counts = {"steps": steps, "batch_size": batch_size, "prompt_limit": 1 if prompt_limit is None else prompt_limit}
    check_numbers(counts, {"height": height, "width": width})
    names, tolerances = scorer_names(scorers), tolerances or {}
    _check_names(models, names, tolerances)
    found = read_prompts(prompts, prompt_column)
    asked = found if prompt_limit is None else found.spread(prompt_limit)
    base = find_base(models.values(), base)
    specs = {BASE: ModelSpec(base, None)} | {name: spec_of(model, base) for name, model in models.items()}
    path = output / RESULTS
    _refuse_others(path, options, asked)
    began_with = stamp(path)
    if height is None or width is None:
        own = native_size([spec.repo for spec in specs.values()], vae_repo)
        height, width = height or own, width or own
    group = join_process_group(accelerator, devices, pin_threads=True)
    sampling = Sampling(height, width, steps, precision or default_precision(group.device), sampler)
    scale = default_guidance_scale(base) if guidance_scale is None else guidance_scale
    judges = {name: Judge(scorer, scorer.fingerprint()) for name, scorer in load_scorers(names, presets).items()}
    if group.rank == 0:
        print(found if asked is found else f"{len(asked.unique)} of {found}")
    contest = Contest(asked.unique, seed, sampling, scale, group, batch_size, cache)
    galleries, drawn_by = {}, {}
    for name, spec in specs.items():
        galleries[name], drawn_by[name] = contest.draw(name, spec, vae_repo, variant)
    contest.score(judges, galleries)
    group.wait()
    scores = group.patiently(lambda: {} if stamp(path) != began_with else contest.collect(judges, galleries))
    if scores is None:
        print(f"{group}: other processes are still at work; the last one writes {path}. {ALONE}")
        return
    about = _describe(contest, specs, drawn_by, judges, tolerances)
    made_with = {"made_with": _versions() | {"device": _name(group.device), "options": _plain(options)}}
    with folder_turn(output, "test"):
        if stamp(path) == began_with:
            outcome = {"scores": scores, "comparisons": compare_all(scores, tolerances)}
            publish(path, {"format": FORMAT, **made_with, **about, **outcome}, galleries)
        else:
            print(f"{group}: another process has written {path}")


def _describe(
    contest: Contest,
    specs: Mapping[str, ModelSpec],
    drawn_by: Mapping[str, str],
    judges: Mapping[str, Judge],
    tolerances: Mapping[str, float],
) -> dict[str, Any]:
    """What was compared, and how."""
    how = {"guidance_scale": contest.guidance_scale, **contest.sampling._asdict()}
    return {
        "sampling": {**how, "seed": contest.seed},
        "prompts": [{"prompt": prompt, "seed": prompt_seed(prompt, contest.seed)} for prompt in contest.prompts],
        "models": {
            name: {"repo": spec.repo, "weights": spec.unet, "fingerprint": drawn_by[name]}
            for name, spec in specs.items()
        },
        "scorers": {
            name: {"fingerprint": judge.fingerprint, "tie_tolerance": tolerances.get(name, 0.0)}
            for name, judge in judges.items()
        },
    }


def _check_names(models: Mapping[str, str], scorers: Sequence[str], tolerances: Mapping[str, float]) -> None:
    """Raise a ValueError before hours of drawing."""
    if not models:
        raise UserValueError("models is empty; name at least one, such as --models.aligned last.ckpt.")
    for name in models:
        if name == BASE:
            raise UserValueError(f"models: {BASE!r} is what they are compared with, see --base. Choose another name.")
        if not NAME.fullmatch(name):
            raise UserValueError(f"models: {name!r} is no name for a folder. Use letters, digits and . _ - alone.")
    for name, tolerance in tolerances.items():
        if name not in scorers:
            raise UserValueError(f"tolerances: {name!r} is not among the scorers {', '.join(scorers)}.")
        check_tolerance(name, tolerance)


def _refuse_others(path: Path, options: Mapping[str, Any], prompts: Prompts) -> None:
    """Raise a ValueError if there are results of other options or prompts; those of the same are replaced."""
    if not path.is_file():
        return
    known, now = read_manifest(path), _plain(options)
    try:
        before, drawn = known["made_with"]["options"], [row["prompt"] for row in known["prompts"]]
        found = known["format"]
    except (KeyError, TypeError):
        found = None
    if found != FORMAT:
        raise UserValueError(
            f"output: {path} is not of this version's lit-align test: its format is {found}, not {FORMAT}. Choose "
            "another folder, or remove the file."
        )
    digests = [Prompts(drawn, 0, 0).digest(), prompts.digest()]
    began, now = (
        {name: value for name, value in values.items() if name not in INCIDENTAL} | {"prompts' digest": digest}
        for values, digest in zip((before, now), digests, strict=True)
    )
    refuse_differences(path.parent, began, now)


def _plain(options: Mapping[str, Any]) -> Any:
    """Options as JSON has them."""
    return json.loads(json.dumps(options, default=str))


def _name(device: torch.device) -> str:
    """What drew and scored."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"


def _versions() -> dict[str, str]:
    modules = (lit_align, torch, diffusers, transformers)
    return {module.__name__: str(module.__version__) for module in modules}
