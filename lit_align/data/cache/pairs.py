"""Pairs from a cache: latents and conditioning that `lit-align encode` computed from images and prompts."""

import random

import torch

from lit_align.data.cache.reader import Cache
from lit_align.data.dataset import PairReader, ReadPair, blank_time_ids
from lit_align.data.labels.ordering import OrderedPairs
from lit_align.data.shards.layout import SampleError
from lit_align.data.shards.scan import Shard
from lit_align.types import CacheOrigin, EncodedBatch, Moments


class CachedPairReader(PairReader):
    """Reads latents and conditioning; it opens neither shards nor images.

    Args:
        cache: of the shards.
        flip_probability: chance of the mirrored images of a pair, by the draw that uncached pairs use.
    """

    def __init__(self, cache: Cache, flip_probability: float) -> None:
        self.cache, self.flip_probability = cache, flip_probability

    def read(self, shard: Shard, row: int, rng: random.Random, shape: tuple[int, int]) -> ReadPair:
        number, known = int(shard.pairs.row[row]), int(shard.pairs.content[row])
        flip = rng.random() < self.flip_probability
        latents = self.cache.latents(shard.path, number, flip)
        same = self.cache.key(shard.path, number) == int(shard.pairs.key[row])
        if not same or (known and known != int(self.cache.content(shard.path, number), 16)):
            raise SampleError(
                f"shard {shard.path}, sample {number}: the cache {self.cache.folder} is stale, or of another shard of "
                f"this name: it has {'other images or another prompt' if same else 'another sample'} there. Encode the "
                "shard again: delete its file in the cache first."
            )
        time_ids = self.cache.time_ids(shard.path, number)
        return ReadPair(latents, time_ids, self.cache.prompt(shard.path, number), flip)

    def blank(self, shape: tuple[int, int]) -> ReadPair:
        latents = torch.zeros(2, *self.cache.latents_shape(*shape), dtype=torch.float16)
        return ReadPair(latents, blank_time_ids(shape), "")

    def batch(self, ordered: OrderedPairs, prompts: list[str]) -> EncodedBatch:
        conditioning = self.cache.conditioning([*prompts, ""])
        return EncodedBatch(
            moments=Moments(ordered.images),
            time_ids=ordered.time_ids,
            conditioning={name: value[:-1] for name, value in conditioning.items()},
            empty={name: value[-1:] for name, value in conditioning.items()},
            pairs=ordered.pairs,
            origin=CacheOrigin(str(self.cache.folder), self.cache.fingerprint["encoders"]),
        )
