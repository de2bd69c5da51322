"""`lit-align generate`: preference pairs that a model draws itself, in shards."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from lit_align.backbones.base import Precision
from lit_align.commands.generate.pair_maker import ImageFormat, Item, PairMaker, Storing
from lit_align.commands.generate.recipes import SIDES, PresetName, Recipe, Side, choose_prefixes
from lit_align.commands.shared.models import (
    ModelSpec,
    Sampling,
    check_numbers,
    default_guidance_scale,
    default_precision,
    load_models,
    native_size,
    place_models,
)
from lit_align.commands.shared.process_group import ProcessGroup, join_process_group
from lit_align.common.lock import locked_folder
from lit_align.common.manifest import check_manifest
from lit_align.common.progress import Progress, show_progress
from lit_align.data.shards.index import INDEX, index_shard, read_entry, write_index
from lit_align.data.shards.writer import NewPair, write_shard
from lit_align.evaluation.prompts import read_prompts
from lit_align.scoring.presets import load_scorers
from lit_align.user_errors import UserValueError

MANIFEST, FORMAT = "generate.json", 1


# Long for its options alone: they are the command line.
def generate(
    prompts: str,
    output: Path,
    repo: str,
    preset: PresetName | None = None,
    chosen_prefix: str | None = None,
    rejected_prefix: str | None = None,
    chosen_unet: str | None = None,
    rejected_unet: str | None = None,
    chosen_repo: str | None = None,
    rejected_repo: str | None = None,
    guidance_scale: float | None = None,
    chosen_guidance_scale: float | None = None,
    rejected_guidance_scale: float | None = None,
    same_noise: bool = False,
    rank_by: str | None = None,
    presets: Path | None = None,
    prompt_column: str | None = None,
    pairs_per_prompt: int = 1,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    steps: int = 50,
    vae_repo: str | None = None,
    variant: str | None = None,
    precision: Precision | None = None,
    batch_size: int = 4,
    pairs_per_shard: int = 100,
    image_format: ImageFormat = "png",
    quality: int = 95,
    accelerator: str = "auto",
    devices: int | str = "auto",
) -> None:
    """Draw two images for each prompt, one a side, and write them as pairs whose caption is the prompt without prefix.

    The chosen side is preferred, or, with --rank_by, the image with the higher score. A prompt's pair depends on the
    prompt, the seed and the options, not on the file around it. A killed run goes on where it stopped; under torchrun
    or SLURM, or with more than one device, the processes share the shards. One command at a time for a folder.

    Args:
        prompts: file of prompts: `.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`, or text, one a line; or one of our own
            sets, `emoji` or `general`. Repeated ones are left out.
        output: folder for shards, `index.json` and `generate.json`, which says how they were made.
        repo: hub id or local folder of a Stable Diffusion or Stable Diffusion XL pipeline of diffusers.
        preset: prefixes of a published data set; options that are given come before it.
        chosen_prefix: what comes before the prompt on the chosen side, with a space between; none: nothing.
        rejected_prefix: the same on the rejected side.
        chosen_unet: UNet folder or LoRA, as lit-align export writes them, or checkpoint of lit-align fit, for the
            chosen side; none: that of the repo.
        rejected_unet: the same for the rejected side.
        chosen_repo: another pipeline for the chosen side; none: `repo`.
        rejected_repo: the same for the rejected side.
        guidance_scale: of classifier-free guidance, 1 turns it off; none: 5 for SDXL, 7.5 for Stable Diffusion.
        chosen_guidance_scale: the same for the chosen side alone.
        rejected_guidance_scale: the same for the rejected side alone.
        same_noise: both images of a pair start from the same noise.
        rank_by: name of a scorer that says which image is preferred, whatever its side; equal scores are a tie.
        presets: YAML file that says what scorer the name is; none: the one of lit-align.
        prompt_column: where prompts are in a table or in objects; none: `prompt`, or as benchmarks call it.
        pairs_per_prompt: each from noise of its own.
        seed: of everything that is drawn; 0 is a seed like any other.
        height: pixels; none: the model's own.
        width: pixels; none: the model's own.
        steps: Euler steps per image.
        vae_repo: hub id or local folder of another VAE.
        variant: weight files' variant in the pipelines, such as `fp16`.
        precision: of the UNets; none: fp16 on a GPU, fp32 on the CPU. The VAE computes in fp32.
        batch_size: images that a model draws at a time.
        pairs_per_shard: pairs in a tar file; a killed process loses those of the one it was at.
        image_format: png stores what was drawn, jpeg and webp lose a little.
        quality: of jpeg and webp, 1 to 100.
        accelerator: `auto`, `cpu` or `gpu`.
        devices: of one machine, a number, or `auto` for all; torchrun and SLURM say it themselves.

    Raises:
        ValueError: if the options do not fit each other, or `output` was begun with others.
    """
    counts = {"pairs_per_prompt": pairs_per_prompt, "steps": steps, "batch_size": batch_size}
    check_numbers(counts | {"pairs_per_shard": pairs_per_shard}, {"height": height, "width": width})
    if not 1 <= quality <= 100:
        raise UserValueError(f"quality is {quality}; it must be from 1 to 100.")
    found = read_prompts(prompts, prompt_column)
    prefixes = choose_prefixes(preset, chosen_prefix, rejected_prefix)
    repos, unets = (chosen_repo or repo, rejected_repo or repo), (chosen_unet, rejected_unet)
    scales = _guidance_scales(repos, guidance_scale, (chosen_guidance_scale, rejected_guidance_scale))
    chosen, rejected = (Side(*parts) for parts in zip(prefixes, repos, unets, scales, strict=True))
    recipe = Recipe(chosen, rejected, same_noise, rank_by)
    scorer = None if rank_by is None else load_scorers([rank_by], presets)[rank_by]
    group = join_process_group(accelerator, devices)
    precision = precision or default_precision(group.device)
    models = load_models([ModelSpec(side.repo, side.unet) for side in recipe.sides], vae_repo, variant)
    if height is None or width is None:
        own = native_size(repos, vae_repo)
        height, width = height or own, width or own
    how, storing = Sampling(height, width, steps, precision), Storing(image_format, quality)
    manifest = {
        "format": FORMAT,
        "prompts": {"count": len(found.unique), "digest": found.digest()},
        "pairs_per_prompt": pairs_per_prompt,
        "pairs_per_shard": pairs_per_shard,
        "seed": seed,
        "recipe": asdict(recipe),
        "weights": {name: model.fingerprint for name, model in zip(SIDES, models, strict=True)},
        "scorer": None if scorer is None else scorer.fingerprint(),
        "vae_repo": vae_repo,
        "drawing": how._asdict() | storing._asdict(),
    }
    with locked_folder(output, "generate", group.run):
        check_manifest(output / MANIFEST, manifest, made=["*.tar"])
        place_models(models, group.device, precision)
        ranking = None if scorer is None else scorer.prepare(group.device)
        maker = PairMaker(recipe, models, ranking, how, storing, seed)
        if group.rank == 0:
            print(found)
        items = [Item(row, prompt, pair) for row, prompt in enumerate(found.unique) for pair in range(pairs_per_prompt)]
        batches = [items[start : start + pairs_per_shard] for start in range(0, len(items), pairs_per_shard)]
        _write_shards(output, batches, maker, batch_size, group)
        group.wait()


def _guidance_scales(repos: Sequence[str], both: float | None, own: Sequence[float | None]) -> Iterator[float]:
    """Each side's: its own, or that of both, or that of its pipeline."""
    for repo, scale in zip(repos, own, strict=True):
        scale = both if scale is None else scale
        yield default_guidance_scale(repo) if scale is None else scale


def _write_shards(
    folder: Path, parts: Sequence[Sequence[Item]], maker: PairMaker, batch_size: int, group: ProcessGroup
) -> None:
    """Draw this process's share of the shards that are not there yet, and the index once all are there."""
    shards = [folder / f"{number:05d}.tar" for number in range(len(parts))]
    mine = range(group.rank, len(parts), group.world_size)
    todo = [number for number in mine if not _is_done(shards[number])]
    with show_progress(
        sum(len(parts[number]) for number in todo), "drawing", "pair", hidden=group.rank > 0
    ) as bar:  # of the first process's share
        for number in todo:
            _write_shard(shards[number], parts[number], maker, batch_size, bar)
    entries = [read_entry(str(shard)) for shard in shards]
    ties = sum(entry.ties for number in mine if (entry := entries[number]) is not None)
    print(f"{group}: drew {len(todo)} shards, {len(mine) - len(todo)} were done before; {ties} pairs are ties")
    missing = entries.count(None)
    if missing:
        print(f"{group}: {missing} shards of other processes are still to come; the last one writes {INDEX}")
    else:
        # Whoever sees all shards writes it, several if they end together: all would write the same.
        index = write_index(
            str(folder), [entry for entry in entries if entry is not None], {"made_by": "lit-align generate"}
        )
        print(f"{folder}: {index['totals']['samples']} pairs in {len(shards)} shards")


def _is_done(shard: Path) -> bool:
    entry = read_entry(str(shard))
    return entry is not None and shard.is_file() and shard.stat().st_size == entry.bytes


def _write_shard(shard: Path, items: Sequence[Item], maker: PairMaker, batch_size: int, bar: Progress) -> None:
    """A shard and its rows; a shard without rows is whole, and was cut short only before them."""
    for left_over in shard.parent.glob(f".{shard.stem}.*.part"):  # by a killed run
        left_over.unlink()
    if shard.is_file() and read_entry(str(shard)) is None:
        bar.update(len(items))
    else:
        write_shard(shard, _counted(maker.make(items, batch_size), bar))
    index_shard(str(shard))


def _counted(pairs: Iterator[NewPair], bar: Progress) -> Iterator[NewPair]:
    for pair in pairs:
        yield pair
        bar.update()
