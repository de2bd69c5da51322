"""Pairs from a cache: what `lit-align encode` has made of their images and prompts."""

import random

import torch

from lit_align.data.cache.reader import Cache
from lit_align.data.dataset import PairSource, ReadPair
from lit_align.data.shards.layout import SampleError
from lit_align.data.shards.scan import Shard
from lit_align.types import PreferenceBatch


class CachedPairs(PairSource):
    """Reads latents and conditioning; neither shards nor images are opened.

    Args:
        cache: of the shards.
        flip_probability: chance of taking the mirrored images of a pair, by the same draw as uncached pairs.
    """

    def __init__(self, cache: Cache, flip_probability: float) -> None:
        self.cache, self.flip_probability = cache, flip_probability

    def read(self, shard: Shard, number: int, draw: random.Random, shape: tuple[int, int]) -> ReadPair:
        row, known = int(shard.pairs.row[number]), int(shard.pairs.content[number])
        flip = draw.random() < self.flip_probability
        latents = self.cache.latents(shard.path, row, flip)
        same = self.cache.key(shard.path, row) == int(shard.pairs.key[number])
        if not same or (known and known != int(self.cache.content(shard.path, row), 16)):
            raise SampleError(
                f"shard {shard.path}, sample {row}: the cache {self.cache.folder} is stale, or of another shard of "
                f"this name: it has {'other images or another prompt' if same else 'another sample'} there. Encode the "
                "shard again: delete its file in the cache first."
            )
        geometry = self.cache.geometry(shard.path, row)
        return ReadPair((latents[0], latents[1]), (geometry[0], geometry[1]), self.cache.prompt(shard.path, row), flip)

    def blank(self, shape: tuple[int, int]) -> ReadPair:
        latents = torch.zeros(self.cache.latents_shape(*shape), dtype=torch.int16)
        geometry = torch.tensor([*shape, 0, 0, *shape])
        return ReadPair((latents, latents), (geometry, geometry), "")

    def finish(self, batch: PreferenceBatch) -> PreferenceBatch:
        """The batch with the conditioning of its prompts and, last, of the empty one."""
        return batch._replace(conditioning=self.cache.conditioning([*batch.prompts, ""]))
