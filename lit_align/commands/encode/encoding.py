"""Encode the pairs of a shard to latents, and prompts to conditioning."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.backbones.encoders import Encoders
from lit_align.commands.encode.encode_plan import PlannedSample, PlannedShard
from lit_align.common.decode_ahead import decode_ahead
from lit_align.data.buckets import Shape
from lit_align.data.cache.format import CachedShard, Flips, Posterior
from lit_align.data.images import PairTransform
from lit_align.data.read_options import ReadOptions
from lit_align.data.shards.index import content_digest, key_digest
from lit_align.data.shards.layout import RawPair, Sample, SampleError, parse_sample, read_samples
from lit_align.user_errors import UserValueError

PROMPTS_AT_A_TIME = 64


class Prepared(NamedTuple):
    """A pair prepared for the VAE."""

    row: int
    location: str
    key: str
    content: str  # digest of images and prompt
    images: Tensor  # (flips, 2, 3, height, width) uint8
    time_ids: Tensor  # (2, 6)


@dataclass(frozen=True)
class Work:
    """Encoders and options for pairs and prompts."""

    encoders: Encoders
    device: torch.device
    prompts: Sequence[str]  # by id
    flips: Flips
    posterior: Posterior
    batch_size: int  # pairs
    read_options: ReadOptions

    @property
    def mirrored(self) -> list[bool]:
        return [False, True] if self.flips == "both" else [False]

    @property
    def images_per_pair(self) -> int:
        return 2 * len(self.mirrored)

    def latents_shape(self, shape: Shape) -> tuple[int, ...]:
        """Return the shape of a pair's latents, see `CachedShard.latents`."""
        moments = 2 if self.posterior == "moments" else 1
        return len(self.mirrored), 2, moments, *self.encoders.latent_shape(*shape)


def encode_shard(shard: PlannedShard, work: Work, progress: Callable[[int], object]) -> CachedShard:
    """Encode all pairs of a shard; `progress` gets the number of images of each batch.

    Raises:
        SampleError: on a broken sample that may not be skipped, or if the shard has changed since planning.
        UserValueError: if latents are not finite.
    """
    samples = len(shard.samples)
    prompt = torch.full((samples,), -1, dtype=torch.int32)
    content, key = torch.zeros(2, samples, dtype=torch.int64)
    time_ids, latents = torch.zeros(samples, 2, 6, dtype=torch.int64), dict[int, Tensor]()
    for batch in prepared_batches(shard, work):
        for pair, encoded in zip(batch, encode_pairs(batch, work), strict=True):
            latents[pair.row] = encoded
            prompt[pair.row] = shard.samples[pair.row].prompt
            content[pair.row], key[pair.row] = signed(int(pair.content, 16)), signed(key_digest(pair.key))
            time_ids[pair.row] = pair.time_ids
        progress(len(batch) * work.images_per_pair)
    return CachedShard(dict(sorted(latents.items())), prompt, content, key, time_ids)


def signed(number: int) -> int:
    """Reinterpret a uint64 as an int64."""
    return number - 2**64 if number >= 2**63 else number


def prepared_batches(shard: PlannedShard, work: Work) -> Iterator[list[Prepared]]:
    """Yield batches of pairs of one shape, which threads decode one batch ahead of the VAE.

    A batch depends on the shard alone: a VAE's rounding depends on the batch, and a resumed run must write identical
    bytes.
    """
    waiting: dict[Shape, list[Prepared]] = {}
    for pair in _prepared(shard, work):
        shape: Shape = (pair.images.shape[-2], pair.images.shape[-1])
        waiting.setdefault(shape, []).append(pair)
        if len(waiting[shape]) == work.batch_size:
            yield waiting.pop(shape)
    yield from waiting.values()


def _prepared(shard: PlannedShard, work: Work) -> Iterator[Prepared]:
    """Yield the readable pairs of a shard in order."""
    samples, count = enumerate(read_samples(shard.path)), 0
    for batch in decode_ahead(lambda numbered: _prepare(shard, *numbered, work), samples, work.batch_size):
        count += len(batch)
        yield from (pair for pair in batch if pair is not None)
    if count != len(shard.samples):
        raise SampleError(f"shard {shard.path} has {count} samples, not {len(shard.samples)}: it has changed.")


def _prepare(shard: PlannedShard, row: int, sample: Sample, work: Work) -> Prepared | None:
    planned = shard.samples[row] if row < len(shard.samples) else PlannedSample(-1, (0, 0))
    if planned.prompt < 0:
        return None  # reported when the labels were read
    try:
        pair = parse_sample(sample)
        if pair.prompt != work.prompts[planned.prompt]:
            raise SampleError(f"{pair.location}: the shard has changed: the prompt was another one before.")
        images, time_ids = prepare_images(pair, planned.shape, work.mirrored)
    except SampleError as error:
        work.read_options.skip_or_raise(error)
        return None
    return Prepared(row, pair.location, pair.key, content_digest(pair), images, time_ids)


def prepare_images(pair: RawPair, shape: Shape, mirrored: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Prepare a pair as training does: images (flips, 2, 3, height, width) uint8 and time_ids (2, 6).

    Raises:
        SampleError: if an image cannot be decoded.
    """
    images = []
    for flip in mirrored:
        transform = PairTransform("center", float(flip))
        made = transform.read(pair, random.Random(0), shape)
        images.append(torch.stack(made.images))
    return torch.stack(images), torch.stack(made.time_ids)


def encode_pairs(pairs: Sequence[Prepared], work: Work) -> list[Tensor]:
    """Encode pairs of one shape to latents, see `CachedShard.latents`.

    Raises:
        UserValueError: if latents are not finite.
    """
    if not pairs:
        return []
    images = torch.stack([pair.images for pair in pairs])  # (pairs, flips, 2, 3, height, width)
    moments = work.encoders.posterior(images.flatten(0, 2).to(work.device)).cpu().unflatten(0, images.shape[:3])
    encoded = []
    for pair, both in zip(pairs, moments, strict=True):
        latents = (both if work.posterior == "moments" else _sample(both, pair.content)).half()
        if not latents.isfinite().all():
            raise work.encoders.not_finite(pair.location, "float16")
        encoded.append(latents)
    return encoded


def _sample(moments: Tensor, content: str) -> Tensor:
    """Sample each posterior; as in training, both images share the noise, which depends on the pair's content."""
    mean, deviation = moments.split(1, dim=2)  # of (flips, 2, moments, channels, h, w)
    generator = torch.Generator().manual_seed(int(content, 16) >> 1)
    return mean + deviation * torch.randn((len(mean), 1, *mean.shape[2:]), generator=generator)


def encode_prompts(prompts: Sequence[str], work: Work) -> dict[str, Tensor]:
    """Encode prompts to conditioning tensors (prompts, ...) float16 by name.

    Raises:
        UserValueError: if a tensor is not finite.
    """
    parts = []
    for start in range(0, len(prompts), PROMPTS_AT_A_TIME):
        batch = list(prompts[start : start + PROMPTS_AT_A_TIME])
        made = {key: value.half().cpu() for key, value in work.encoders.encode_prompts(batch).items()}
        for key, value in made.items():
            for prompt, row in zip(batch, value, strict=True):
                if not row.isfinite().all():
                    raise UserValueError(f"The text encoders' {key} of {prompt[:80]!r} is not finite in float16.")
        parts.append(made)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
