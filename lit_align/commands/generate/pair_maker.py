"""Make pairs from prompts: the model of each side generates an image, and a scorer may decide which is preferred."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from torch import Tensor

from lit_align.commands.generate.recipes import SIDES, Recipe, pair_seeds
from lit_align.commands.shared.models import Model, Sampling
from lit_align.common.choices import ImageFormat
from lit_align.common.pixels import encode_image, from_image
from lit_align.data.decoder import decode
from lit_align.data.shards.writer import NewPair
from lit_align.scoring.base import Scorer


class Storing(NamedTuple):
    """Settings of image encoding."""

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


def divide(prompts: Sequence[str], pairs_per_prompt: int, pairs_per_shard: int) -> list[list[Item]]:
    """Divide the pairs of all prompts into shards."""
    items = [Item(row, prompt, pair) for row, prompt in enumerate(prompts) for pair in range(pairs_per_prompt)]
    return [items[start : start + pairs_per_shard] for start in range(0, len(items), pairs_per_shard)]


class PairMaker(NamedTuple):
    """Makes pairs of prompts."""

    recipe: Recipe
    models: Sequence[Model]  # chosen side, rejected side
    scorer: Scorer | None  # that ranks, if `recipe` says so
    how: Sampling
    storing: Storing
    seed: int

    def make(self, items: Sequence[Item], batch_size: int) -> Iterator[NewPair]:
        """The pairs of `items`, drawn `batch_size` at a time."""
        with ThreadPoolExecutor() as pool:  # PIL encodes without the interpreter's lock
            for start in range(0, len(items), batch_size):
                yield from self._make_batch(items[start : start + batch_size], pool)

    def _make_batch(self, items: Sequence[Item], pool: ThreadPoolExecutor) -> Iterator[NewPair]:
        draws = [pair_seeds(item.prompt, self.seed, item.pair, self.recipe.same_noise) for item in items]
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
        options: dict[str, Any] = {} if self.storing.image_format == "png" else {"quality": self.storing.quality}
        return encode_image(image, self.storing.image_format, **options)

    def _score(self, scorer: Scorer, items: Sequence[Item], encoded: list[list[bytes]]) -> list[list[float]]:
        """Scores of the images as they are stored, by side."""
        images = [from_image(decode(data)) for side in encoded for data in side]
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
