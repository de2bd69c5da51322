"""`lit-align generate`: shards of preference pairs whose images a model samples."""

from dataclasses import asdict, dataclass
from pathlib import Path

from lit_align.commands.generate.recipes import SIDES, PresetName, Recipe, Side, choose_prefixes
from lit_align.commands.shared.options import DeviceOptions, SamplingOptions
from lit_align.common.choices import ImageFormat
from lit_align.common.lock import locked_folder
from lit_align.common.manifest import check_manifest
from lit_align.evaluation.prompts import read_prompts
from lit_align.user_errors import UserValueError

MANIFEST, FORMAT = "generate.json", 1


@dataclass(kw_only=True)
class Generate(SamplingOptions, DeviceOptions):
    """Sample two images for each prompt, one per side, and write them as pairs; captions have no prefix.

    The chosen side is preferred, or, with --rank_by, the image with the higher score. A prompt's pair depends on the
    prompt, the seed and the options, not on the other prompts of the file. The same command resumes a killed run. Under
    torchrun or SLURM, or with several devices, the processes share the shards; a second command on one output is
    refused.

    Args:
        prompts: file of prompts: `.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`, or text with one per line; or a set,
            `emoji` or `general`, of lit-align; or shards of pairs, their folder or their index.json. Repeated prompts
            are left out.
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
        chosen_guidance_scale: guidance scale of the chosen side alone.
        rejected_guidance_scale: guidance scale of the rejected side alone.
        same_noise: both images of a pair start from one noise.
        rank_by: name of a scorer that says which image is preferred, on either side; equal scores are a tie.
        presets: YAML file that defines the scorer; none: the presets of lit-align.
        prompt_column: column or key of the prompts; none: `prompt`, or the names that benchmarks use.
        pairs_per_prompt: each from another noise.
        seed: seed of all random choices.
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
        from lit_align.commands.generate.made_shards import write_shards  # here, so that --help imports no torch
        from lit_align.commands.generate.pair_maker import PairMaker, Storing, divide
        from lit_align.commands.shared.models import ModelSpec, load_models, move_models
        from lit_align.scoring.presets import load_scorers

        self._check()
        prompts, recipe = read_prompts(self.prompts, self.prompt_column), self._recipe()
        scorer = None if self.rank_by is None else load_scorers([self.rank_by], self.presets)[self.rank_by]
        group = self.join()
        specs = [ModelSpec(side.repo, side.unet) for side in recipe.sides]
        models = load_models(specs, self.vae_repo, self.variant)
        sampling = self.sampling([spec.repo for spec in specs], group.device)
        storing = Storing(self.image_format, self.quality)
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
            parts = divide(prompts.unique, self.pairs_per_prompt, self.pairs_per_shard)
            write_shards(self.output, parts, maker, self.batch_size, group)
            group.wait()

    def _check(self) -> None:
        names = ("pairs_per_prompt", "batch_size", "pairs_per_shard")
        self.check_numbers(**{name: getattr(self, name) for name in names})
        if not 1 <= self.quality <= 100:
            raise UserValueError(f"quality is {self.quality}; it must be from 1 to 100.")

    def _recipe(self) -> Recipe:
        prefixes = choose_prefixes(self.preset, self.chosen_prefix, self.rejected_prefix)
        repos = (self.chosen_repo or self.repo, self.rejected_repo or self.repo)
        unets = (self.chosen_unet, self.rejected_unet)
        scales = (self.chosen_guidance_scale, self.rejected_guidance_scale)
        chosen, rejected = (
            Side(prefix, repo, unet, self.guidance_for(repo) if scale is None else scale)
            for prefix, repo, unet, scale in zip(prefixes, repos, unets, scales, strict=True)
        )
        return Recipe(chosen, rejected, self.same_noise, self.rank_by)
