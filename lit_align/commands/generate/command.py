"""`lit-align generate`: preference pairs that a model draws itself, in shards."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lit_align.commands.generate.pair_maker import ImageFormat, Item, PairMaker, Storing
from lit_align.commands.generate.recipes import SIDES, PresetName, Recipe, Side, choose_prefixes
from lit_align.commands.shared.models import (
    ModelSpec,
    Sampling,
    check_numbers,
    default_guidance_scale,
    default_precision,
    load_models,
    move_models,
    native_size,
)
from lit_align.commands.shared.options import DeviceOptions, SamplingOptions
from lit_align.commands.shared.process_group import ProcessGroup
from lit_align.common.lock import locked_folder
from lit_align.common.manifest import check_manifest
from lit_align.common.progress import Progress, show_progress
from lit_align.data.shards.index import INDEX, index_shard, read_entry, write_index
from lit_align.data.shards.writer import NewPair, write_shard
from lit_align.evaluation.prompts import read_prompts
from lit_align.scoring.presets import load_scorers
from lit_align.user_errors import UserValueError

MANIFEST, FORMAT = "generate.json", 1


@dataclass(kw_only=True)
class Generate(SamplingOptions, DeviceOptions):
    """Sample two images for each prompt, one a side, and write them as pairs; captions are the prompts without prefix.

    The chosen side is preferred, or, with --rank_by, the image with the higher score. A prompt's pair depends on the
    prompt, the seed and the options, not on the other prompts of the file. The same command resumes a killed run. Under
    torchrun or SLURM, or with several devices, the processes share the shards; a second command on one output is
    refused.

    Args:
        prompts: file of prompts: `.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`, or text, one a line; or a bundled set,
            `emoji` or `general`. Repeated prompts are left out.
        output: folder for shards, `index.json` and `generate.json`, which says how they were made.
        repo: hub id or local folder of a Stable Diffusion or Stable Diffusion XL pipeline of diffusers.
        preset: prefixes of a published data set; a prefix that is given has priority.
        chosen_prefix: text before the prompt on the chosen side, with a space between; none: no text.
        rejected_prefix: text before the prompt on the rejected side, with a space between; none: no text.
        chosen_unet: UNet folder or LoRA, as lit-align export writes them, or checkpoint of lit-align fit, for the
            chosen side; none: the pipeline's UNet.
        rejected_unet: UNet folder, LoRA or checkpoint for the rejected side; none: the pipeline's UNet.
        chosen_repo: another pipeline for the chosen side; none: `repo`.
        rejected_repo: another pipeline for the rejected side; none: `repo`.
        guidance_scale: of classifier-free guidance, 1 turns it off; none: 5 for SDXL, 7.5 for Stable Diffusion.
        chosen_guidance_scale: guidance scale of the chosen side alone.
        rejected_guidance_scale: guidance scale of the rejected side alone.
        same_noise: both images of a pair start from one noise.
        rank_by: name of a scorer that says which image is preferred, on either side; equal scores are a tie.
        presets: YAML file that defines the scorer; none: the presets of lit-align.
        prompt_column: column or key of the prompts; none: `prompt`, or the names that benchmarks use.
        pairs_per_prompt: each from another noise.
        seed: of everything that is drawn at random.
        batch_size: images that a model samples at a time.
        pairs_per_shard: pairs in a tar file; a killed process loses the pairs of its unfinished shard.
        image_format: png is lossless, jpeg and webp are not.
        quality: of jpeg and webp, 1 to 100.

    Raises:
        UserValueError: if the options do not fit each other, or `output` was begun with others.
    """

    prompts: str
    output: Path
    repo: str
    preset: PresetName | None = None
    chosen_prefix: str | None = None
    rejected_prefix: str | None = None
    chosen_unet: str | None = None
    rejected_unet: str | None = None
    chosen_repo: str | None = None
    rejected_repo: str | None = None
    guidance_scale: float | None = None
    chosen_guidance_scale: float | None = None
    rejected_guidance_scale: float | None = None
    same_noise: bool = False
    rank_by: str | None = None
    presets: Path | None = None
    prompt_column: str | None = None
    pairs_per_prompt: int = 1
    seed: int = 0
    batch_size: int = 4
    pairs_per_shard: int = 100
    image_format: ImageFormat = "png"
    quality: int = 95

    def run(self) -> None:
        """Write the shards that are missing."""
        self._check()
        prompts, recipe = read_prompts(self.prompts, self.prompt_column), self._recipe()
        scorer = None if self.rank_by is None else load_scorers([self.rank_by], self.presets)[self.rank_by]
        group = self.join()
        specs = [ModelSpec(side.repo, side.unet) for side in recipe.sides]
        models = load_models(specs, self.vae_repo, self.variant)
        sampling, storing = self._sampling(recipe, group.device), Storing(self.image_format, self.quality)
        manifest = {
            "format": FORMAT,
            "prompts": {"count": len(prompts.unique), "digest": prompts.digest()},
            "pairs_per_prompt": self.pairs_per_prompt,
            "pairs_per_shard": self.pairs_per_shard,
            "seed": self.seed,
            "recipe": asdict(recipe),
            "weights": {name: model.fingerprint for name, model in zip(SIDES, models, strict=True)},
            "scorer": None if scorer is None else scorer.fingerprint(),
            "vae_repo": self.vae_repo,
            "drawing": sampling._asdict() | storing._asdict(),
        }
        with locked_folder(self.output, "generate", group.run):
            check_manifest(self.output / MANIFEST, manifest, made=["*.tar"])
            move_models(models, group.device, sampling.precision)
            ranking = None if scorer is None else scorer.prepare(group.device)
            maker = PairMaker(recipe, models, ranking, sampling, storing, self.seed)
            if group.rank == 0:
                print(prompts)
            _write_shards(self.output, self._batches(prompts.unique), maker, self.batch_size, group)
            group.wait()

    def _check(self) -> None:
        names = ("pairs_per_prompt", "steps", "batch_size", "pairs_per_shard")
        check_numbers({name: getattr(self, name) for name in names}, {"height": self.height, "width": self.width})
        if not 1 <= self.quality <= 100:
            raise UserValueError(f"quality is {self.quality}; it must be from 1 to 100.")

    def _recipe(self) -> Recipe:
        prefixes = choose_prefixes(self.preset, self.chosen_prefix, self.rejected_prefix)
        repos = (self.chosen_repo or self.repo, self.rejected_repo or self.repo)
        unets = (self.chosen_unet, self.rejected_unet)
        scales = (self.chosen_guidance_scale, self.rejected_guidance_scale)
        chosen, rejected = (
            Side(prefix, repo, unet, self._guidance_scale(repo, scale))
            for prefix, repo, unet, scale in zip(prefixes, repos, unets, scales, strict=True)
        )
        return Recipe(chosen, rejected, self.same_noise, self.rank_by)

    def _guidance_scale(self, repo: str, own: float | None) -> float:
        scale = self.guidance_scale if own is None else own
        return default_guidance_scale(repo) if scale is None else scale

    def _sampling(self, recipe: Recipe, device: torch.device) -> Sampling:
        height, width = self.height, self.width
        if height is None or width is None:
            size = native_size([side.repo for side in recipe.sides], self.vae_repo)
            height, width = height or size, width or size
        return Sampling(height, width, self.steps, self.precision or default_precision(device))

    def _batches(self, prompts: Sequence[str]) -> list[list[Item]]:
        """Divide all pairs into shards."""
        items = [Item(row, prompt, pair) for row, prompt in enumerate(prompts) for pair in range(self.pairs_per_prompt)]
        return [items[start : start + self.pairs_per_shard] for start in range(0, len(items), self.pairs_per_shard)]


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
