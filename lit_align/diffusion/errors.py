"""Noised latents and denoising errors of pairs: both images of a pair get one noise and one timestep."""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.diffusion.schedule import NoiseSchedule
from lit_align.types import PairErrors


class NoisedPair(NamedTuple):
    """Noised latents and targets of both images of all pairs; the chosen images are the first half."""

    latents: Tensor  # (2 * batch, channels, h, w) float32
    timesteps: Tensor  # (2 * batch,)
    target: Tensor  # (2 * batch, channels, h, w) float32


def noise_pair(
    schedule: NoiseSchedule, chosen: Tensor, rejected: Tensor, noise: Tensor, timesteps: Tensor
) -> NoisedPair:
    """Add one noise at one timestep to the chosen and the rejected latents (batch, channels, h, w) of each pair."""
    clean = torch.cat([chosen, rejected])
    both_noise, both_times = torch.cat([noise, noise]), torch.cat([timesteps, timesteps])
    noisy = schedule.add_noise(clean, both_noise, both_times)
    return NoisedPair(noisy, both_times, schedule.target(clean, both_noise, both_times))


def pair_errors(prediction: Tensor, target: Tensor) -> PairErrors:
    """Compute the mean squared error of each image over its own elements, in float32, from (2 * batch, ...)."""
    chosen, rejected = image_errors(prediction, target).chunk(2)
    return PairErrors(chosen, rejected)


def pair_overlap(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the mean product (batch,) of both images' residuals, in float32, from (2 * batch, ...); no gradients."""
    chosen, rejected = (prediction.detach().float() - target.float()).flatten(1).chunk(2)
    return (chosen * rejected).mean(1)


def image_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared error (n,) of each image over its own elements, in float32, from (n, ...)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
