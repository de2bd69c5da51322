"""The values that pass between rooms."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

STRIDE = 0x9E3779B97F4A7C  # even; places far apart get weights that differ in most bits
FLIPPED = 0x5DEECE66D  # added to the checksum of a mirrored pair, whose bytes are those of the plain one


class PairInfo(NamedTuple):
    """Numbers, weights and labels of the pairs of a batch."""

    numbers: list[int]  # of the pairs in their data set; not a tensor, as reading one would wait for the device
    weight: Tensor  # (batch,) float32: 1 for a pair that counts, 0 for an unreadable or undecided one
    flipped: Tensor  # (batch,) bool: whether both images are mirrored
    human: Tensor  # (batch,) int64: 1 where the human label agrees with the order, -1 where it disagrees, 0 for a tie
    vote_share: Tensor  # (batch,) float32: share of the votes for the order; 0 where the tie rule decided
    balance: Tensor  # (batch,) float32: share of the votes for the order less that against it, at least 0
    voted: bool  # whether a vote of scorers and its tie rule made the order
    faults: tuple[str, ...] = ()  # why pairs of weight 0 could not be read

    @property
    def size(self) -> int:
        """Number of pairs, those of weight 0 included."""
        return len(self.weight)


class PreferenceBatch(NamedTuple):
    """Preference pairs as pixels; the chosen image of each pair comes first."""

    images: Tensor  # (batch, 2, 3, height, width) uint8
    time_ids: Tensor  # (batch, 2, 6) int64 pixels: original h, w; crop top, left; target h, w (the order of SDXL)
    prompts: list[str]  # batch of them
    pairs: PairInfo

    # Integers, because Lightning casts floating point tensors of a batch to the Trainer's precision, and bfloat16
    # cannot hold sizes such as 683.

    def checksums(self) -> Tensor:
        """(batch, 2) int64, by which another run knows images, crops, order, flip and prompt of a pair again."""
        prompts = [int.from_bytes(prompt.encode(), "big") % (2**61 - 1) for prompt in self.prompts]
        sent = torch.tensor(prompts).to(self.images.device, non_blocking=True)
        return _checksums(self.images, self.time_ids, self.pairs.flipped, sent)

    @property
    def chosen(self) -> Tensor:
        """(batch, 3, height, width) uint8."""
        return self.images[:, 0]

    @property
    def rejected(self) -> Tensor:
        """(batch, 3, height, width) uint8."""
        return self.images[:, 1]


class Moments:
    """Moments of the VAE's posterior of both images of each pair, before scaling.

    Not a bare tensor: Lightning moves such an object to the device with the batch, but does not cast it.

    Args:
        values: (batch, 2, moments, channels, h, w) float16 or float32; the moments are mean and standard deviation, or
            one sample of the posterior.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Moments":
        """The moments on another device."""
        return Moments(self.values.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: str | None = None) -> "Moments":
        """The moments in pinned memory; the DataLoader calls it."""
        return Moments(self.values.pin_memory())


class CacheOrigin(NamedTuple):
    """The cache that an encoded batch was read from."""

    folder: str
    encoders: Mapping[str, str]  # identity of the encoders that made it, see `Encoders.encoders_identity`


class EncodedBatch(NamedTuple):
    """Preference pairs as the denoiser needs them, encoded once for any number of draws."""

    moments: Moments  # the chosen image of each pair first
    time_ids: Tensor  # (batch, 2, 6) int64, see `PreferenceBatch`
    conditioning: dict[str, Tensor]  # (batch, ...) each: the encoded prompts
    empty: dict[str, Tensor]  # (1, ...) each: the encoded empty prompt
    pairs: PairInfo
    origin: CacheOrigin | None = None

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """(channels, h, w) of the latents of one image."""
        return tuple(self.moments.values.shape[-3:])

    def checksums(self) -> Tensor:
        """(batch, 2) int64, see `PreferenceBatch.checksums`."""
        prompts = torch.stack([_words(value.float()) for value in self.conditioning.values()]).sum(0)
        return _checksums(self.moments.values, self.time_ids, self.pairs.flipped, prompts)

    def drop_prompts(self, dropped: Tensor) -> "EncodedBatch":
        """Replace the prompts of some pairs by the empty one; `dropped` is (batch,) bool."""
        dropped = dropped.to(self.time_ids.device, non_blocking=True)  # else the host would wait for the device
        conditioning = {
            name: torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), self.empty[name].to(value), value)
            for name, value in self.conditioning.items()
        }
        return self._replace(conditioning=conditioning)


def _checksums(images: Tensor, time_ids: Tensor, flipped: Tensor, prompts: Tensor) -> Tensor:
    """Add up both images (batch, 2, ...) and their sizes, whether they are mirrored, and a number of each prompt."""
    sums = _words(images.flatten(0, 1)) + _words(time_ids.flatten(0, 1))
    return sums.view(-1, 2) + (flipped.long() * FLIPPED + prompts)[:, None]


def _words(values: Tensor) -> Tensor:
    """Add up the bytes of each row of (n, ...) in words of 4, or as many as fit, each times a weight of its place.

    (n,) int64; the sums wrap alike on all devices.
    """
    rows = values.flatten(1).contiguous().view(torch.uint8)
    word = next(kind for kind in (torch.int32, torch.int16, torch.int8) if rows.shape[1] % kind.itemsize == 0)
    words = rows.view(word)
    weights = torch.arange(words.shape[1], device=words.device) * STRIDE + 1  # odd
    return (words * weights).sum(1)


class PairErrors(NamedTuple):
    """Denoising errors of a batch of pairs: mean squared error of each image over its own elements."""

    chosen: Tensor  # (batch,) float32
    rejected: Tensor  # (batch,) float32


class PairFacts(NamedTuple):
    """What an objective may ask for beside errors, by `Objective.needs`; (batch,) float32 each, without gradients."""

    overlap: Tensor | None = None  # mean over the elements of the product of both images' residuals
    alpha_bar: Tensor | None = None  # share of the signal's variance at the pair's timestep
    confidence: Tensor | None = None  # probability that the order is right, by the vote: 0.5 where it was tied


class ObjectiveOutput(NamedTuple):
    """Loss, margin and logged terms of each pair."""

    losses: Tensor  # (batch,) with gradients
    margin: Tensor  # (batch,) detached logit: positive where the policy prefers the chosen image
    terms: dict[str, Tensor]  # (batch,) detached each: further values to log, by their name in the log
