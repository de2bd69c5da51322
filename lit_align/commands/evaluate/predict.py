"""`lit-align predict`: images of prompts, by any model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_align.backbones.base import Precision
from lit_align.backbones.sampling import Sampler
from lit_align.commands.shared.image_files import Wanted, draw_images, is_whole, note_plain
from lit_align.commands.shared.models import (
    Sampling,
    check_numbers,
    default_guidance_scale,
    default_precision,
    find_base,
    is_pipeline,
    load_models,
    native_size,
    place_models,
    spec_of,
)
from lit_align.commands.shared.process_group import ALONE, ProcessGroup, join_process_group
from lit_align.common.files import write_text
from lit_align.common.manifest import check_manifest
from lit_align.common.progress import show_progress
from lit_align.evaluation.noise import prompt_seed
from lit_align.evaluation.prompts import read_prompts

MANIFEST, FORMAT = "predict.json", 1
TABLE = "images.jsonl"


# Long for its options alone: they are the command line.
def predict(
    prompts: str,
    output: Path,
    model: str,
    base: str | None = None,
    images_per_prompt: int = 1,
    seed: int = 0,
    sampler: Sampler = "euler",
    steps: int = 50,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    precision: Precision | None = None,
    batch_size: int = 4,
    prompt_column: str | None = None,
    vae_repo: str | None = None,
    variant: str | None = None,
    accelerator: str = "auto",
    devices: int | str = "auto",
) -> None:
    """Draw images of prompts, with a checkpoint, an exported model or a whole pipeline.

    The first image of a prompt is the one that `lit-align test` draws of it with the same options. A killed run goes on
    where it stopped; under torchrun or SLURM, or with more than one device, the processes share the prompts.

    Args:
        prompts: file of prompts: `.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`, or text, one a line; or one of our own
            sets, `emoji` or `general`. Repeated ones are left out.
        output: folder for `00000-0.png` (prompt and image, from 0), `images.jsonl`, which says what they are, and
            `predict.json`, which says how they were made.
        model: checkpoint of lit-align fit, UNet folder or LoRA, or a pipeline, hub id or local folder.
        base: pipeline that the model was trained from; none: the one that the checkpoint names.
        images_per_prompt: image i has the noise that seed + i would give to a first one.
        seed: of the noise, together with the prompt; 0 is a seed like any other.
        sampler: `euler`, `ddim` or `dpm++` (second order, 2M), each with the schedule of the model's pipeline.
        steps: of the sampler, per image.
        guidance_scale: of classifier-free guidance, 1 turns it off; none: 5 for SDXL, 7.5 for Stable Diffusion.
        height: pixels; none: the model's own.
        width: pixels; none: the model's own.
        precision: of the UNet; none: fp16 on a GPU, fp32 on the CPU. The VAE computes in fp32.
        batch_size: images drawn at a time on a GPU; on the CPU each is drawn alone.
        prompt_column: where prompts are in a table or in objects; none: `prompt`, or as benchmarks call it.
        vae_repo: hub id or local folder of another VAE.
        variant: weight files' variant in the pipeline, such as `fp16`.
        accelerator: `auto`, `cpu` or `gpu`. The CPU takes one thread, or as many as OMP_NUM_THREADS says: results
            depend on their number in the last digits.
        devices: of one machine, a number, or `auto` for all; torchrun and SLURM say it themselves.

    Raises:
        ValueError: if the options do not fit each other, or `output` was begun with others.
    """
    counts = {"images_per_prompt": images_per_prompt, "steps": steps, "batch_size": batch_size}
    check_numbers(counts, {"height": height, "width": width})
    found = read_prompts(prompts, prompt_column)
    spec = spec_of(model, model if is_pipeline(model) else find_base([model], base))
    group = join_process_group(accelerator, devices, pin_threads=True)
    precision = precision or default_precision(group.device)
    models = load_models([spec], vae_repo, variant)
    if height is None or width is None:
        own = native_size([spec.repo], vae_repo)
        height, width = height or own, width or own
    how = Sampling(height, width, steps, precision, sampler)
    scale = default_guidance_scale(spec.repo) if guidance_scale is None else guidance_scale
    manifest = {
        "format": FORMAT,
        "prompts": {"count": len(found.unique), "digest": found.digest()},
        "images_per_prompt": images_per_prompt,
        "seed": seed,
        "model": spec._asdict(),
        "weights": models[0].fingerprint,
        "vae_repo": vae_repo,
        "drawing": {"guidance_scale": scale, **how._asdict()},
    }
    check_manifest(output / MANIFEST, manifest, made=["*.png"])
    place_models(models, group.device, precision)
    if group.rank == 0:
        print(found)
    rows = _rows(found.unique, images_per_prompt, seed)
    mine = [Wanted(row["prompt"], row["seed"], output / row["file"]) for row in rows[group.rank :: group.world_size]]
    todo = [image for image in mine if not is_whole(image.path)]
    with show_progress(len(todo), "drawing", "image", hidden=group.rank > 0) as bar:
        plain = draw_images(models[0], todo, scale, how, batch_size, bar.update)
    note_plain(group, "the model", plain)
    print(f"{group}: drew {len(todo)} images, {len(mine) - len(todo)} were done before")
    group.wait()
    _write_table(output, rows, group)


def _rows(prompts: Sequence[str], images_per_prompt: int, seed: int) -> list[dict[str, Any]]:
    return [
        {"number": number, "prompt": prompt, "seed": prompt_seed(prompt, seed + i), "file": f"{number:05d}-{i}.png"}
        for number, prompt in enumerate(prompts)
        for i in range(images_per_prompt)
    ]


def _write_table(output: Path, rows: Sequence[dict[str, Any]], group: ProcessGroup) -> None:
    """Whoever sees all images writes it, several processes if they end together: all would write the same."""

    def missing() -> int:
        return sum(not (output / row["file"]).is_file() for row in rows)

    if group.patiently(lambda: None if missing() else True) is None:
        left = missing()
        print(f"{group}: {left} images of other processes are still to come; the last one writes {TABLE}. {ALONE}")
        return
    write_text(output / TABLE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{output}: {len(rows)} images, which {TABLE} describes")
