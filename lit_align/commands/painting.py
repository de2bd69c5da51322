"""From prompts to pairs: each side's model draws, and a scorer may decide."""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from inspect import signature
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lit_align.backbones import sampling
from lit_align.backbones.base import DTYPES, Backbone, Precision
from lit_align.backbones.exported import backbone_class, fingerprint, load_denoiser
from lit_align.backbones.reference import Denoiser
from lit_align.commands.recipes import SIDES, Recipe, Side, draw
from lit_align.data.images import decode
from lit_align.data.writing import NewPair
from lit_align.scoring.base import Scorer

ImageFormat = Literal["png", "jpeg", "webp"]


class Sampling(NamedTuple):
    """How the images of both sides are drawn and stored."""

    height: int  # pixels
    width: int
    steps: int
    precision: Precision
    image_format: ImageFormat
    quality: int  # of jpeg and webp


class Item(NamedTuple):
    """A pair to be made."""

    number: int  # of its prompt in the file
    prompt: str
    pair: int  # number among the prompt's pairs

    @property
    def key(self) -> str:
        return f"{self.number:08d}-{self.pair}"


class Model(NamedTuple):
    """A denoiser and the rest of its pipeline, which other denoisers share."""

    backbone: Backbone
    denoiser: Denoiser
    fingerprint: str

    def draw(self, prompts: list[str], seeds: list[int], guidance_scale: float, how: Sampling) -> Tensor:
        """Images (n, 3, height, width) uint8 on the CPU.

        Raises:
            ValueError: if one is of one colour, for that is what NaN looks like once it is an image.
        """
        self.backbone.denoiser = self.denoiser
        device = self.denoiser.device.type
        dtype = DTYPES[how.precision]
        with nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype):
            images = sampling.generate(self.backbone, prompts, seeds, how.height, how.width, how.steps, guidance_scale)
        flat = images.flatten(1).amin(1) == images.flatten(1).amax(1)
        if flat.any():
            row = int(flat.nonzero()[0])
            raise ValueError(
                f"{self.backbone.repo} drew one colour alone for {prompts[row]!r}, seed {seeds[row]}: its numbers were "
                f"probably not finite in {how.precision}. Try --precision bf16 or fp32, with another --output."
            )
        return images


def load_models(sides: Sequence[Side], vae_repo: str | None, variant: str | None) -> list[Model]:
    """Each side's model, in float32 on the CPU; what sides have in common is there once."""
    backbones: dict[str, Backbone] = {}
    models: dict[tuple[str, str | None], Model] = {}
    for side in sides:
        if side.repo not in backbones:
            kind = backbone_class(side.repo)
            # One image at a time through the VAE, so that a large batch takes little memory.
            backbones[side.repo] = kind(side.repo, vae_repo, variant=variant, vae_slicing=True).requires_grad_(False)
        backbone = backbones[side.repo]
        if (side.repo, side.unet) not in models:
            # `Model.draw` exchanges the backbone's denoiser, but nothing is drawn before all are loaded.
            denoiser = backbone.denoiser if side.unet is None else load_denoiser(backbone, side.unet)
            models[side.repo, side.unet] = Model(backbone, denoiser, fingerprint(backbone, denoiser))
    return [models[side.repo, side.unet] for side in sides]


def place_models(models: Sequence[Model], device: torch.device, precision: Precision) -> None:
    """Move them to where they draw. Text encoders stay in float32: SDXL's sizes are cast to their precision."""
    for model in models:
        model.backbone.denoiser = model.denoiser
        model.backbone.to(device)
        nn.Module.to(model.denoiser, DTYPES[precision])  # diffusers' own `to` warns of parts that UNets do not have


def default_guidance_scale(repo: str) -> float:
    """That of the pipeline's own call: 5 for SDXL, 7.5 for Stable Diffusion."""
    return float(signature(backbone_class(repo).pipeline_class.__call__).parameters["guidance_scale"].default)


def native_size(models: Sequence[Model]) -> int:
    """The side in pixels that the models draw by themselves.

    Raises:
        ValueError: if they do not agree.
    """
    sizes = set()
    for model in models:
        wanted = model.denoiser.config.sample_size  # in latents, whose size grows evenly with the image's
        _, latents, _ = model.backbone.latent_shape(1 << 16, 1 << 16)
        sizes.add((wanted << 16) // latents)
    if len(sizes) > 1:
        raise ValueError(f"The models draw {sorted(sizes)} pixels by themselves. Say --height and --width.")
    return int(next(iter(sizes)))


class PairMaker(NamedTuple):
    """Makes pairs of prompts."""

    recipe: Recipe
    models: Sequence[Model]  # chosen side, rejected side
    scorer: Scorer | None  # that ranks, if `recipe` says so
    how: Sampling
    seed: int

    def make(self, items: Sequence[Item], batch_size: int) -> Iterator[NewPair]:
        """The pairs of `items`, drawn `batch_size` at a time."""
        with ThreadPoolExecutor() as pool:  # PIL encodes without the interpreter's lock
            for start in range(0, len(items), batch_size):
                yield from self._make_batch(items[start : start + batch_size], pool)

    def _make_batch(self, items: Sequence[Item], pool: ThreadPoolExecutor) -> Iterator[NewPair]:
        draws = [draw(item.prompt, self.seed, item.pair, self.recipe.same_noise) for item in items]
        encoded: list[list[bytes]] = []
        for number, (side, model) in enumerate(zip(self.recipe.sides, self.models, strict=True)):
            prompts = [side.prompt(item.prompt) for item in items]
            images = model.draw(prompts, [drawn.seeds[number] for drawn in draws], side.guidance_scale, self.how)
            encoded.append(list(pool.map(self._encode, images)))
        scores = None if self.scorer is None else self._score(self.scorer, items, encoded)
        for row, (item, drawn) in enumerate(zip(items, draws, strict=True)):
            order = (1, 0) if drawn.rejected_first else (0, 1)
            values = [None if scores is None else scores[number][row] for number in order]
            label_0 = float(order[0] == 0) if scores is None else _compare(values[0], values[1])
            more = {
                "pair": item.pair,
                "run_seed": self.seed,
                "label_by": self.recipe.rank_by or "side",
                **{
                    f"image_{place}": self._about(number, item, drawn.seeds[number], values[place])
                    for place, number in enumerate(order)
                },
            }
            first, second = (encoded[number][row] for number in order)
            yield NewPair(item.key, first, second, label_0, item.prompt, more)

    def _encode(self, image: Tensor) -> bytes:
        options: dict[str, Any] = {} if self.how.image_format == "png" else {"quality": self.how.quality}
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, self.how.image_format, **options)
        return buffer.getvalue()

    def _score(self, scorer: Scorer, items: Sequence[Item], encoded: list[list[bytes]]) -> list[list[float]]:
        """Scores of the images as they are stored, by side."""
        arrays = [np.array(decode(data)) for side in encoded for data in side]
        images = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
        scores: list[float] = scorer.score(images, [item.prompt for item in items] * 2).tolist()
        return [scores[: len(items)], scores[len(items) :]]

    def _about(self, number: int, item: Item, seed: int, score: float | None) -> dict[str, Any]:
        side = self.recipe.sides[number]
        about = {
            "prompt": side.prompt(item.prompt),
            "seed": seed,
            "guidance_scale": side.guidance_scale,
            "repo": side.repo,
            "unet": side.unet,
        }
        return {"side": SIDES[number], **about} if score is None else {**about, "score": score}


def _compare(first: float | None, second: float | None) -> float:
    """The label of image 0 by both scores; equal ones are a tie."""
    assert first is not None
    assert second is not None
    return 0.5 if first == second else float(first > second)
