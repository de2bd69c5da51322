"""From a pair of latents to a pair of errors, on one noise and one timestep."""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.diffusion.schedule import NoiseSchedule
from lit_align.types import PairErrors


class NoisedPair(NamedTuple):
    """Both images of all pairs in one batch, chosen half first."""

    latents: Tensor  # (2 * batch, channels, h, w) float32
    timesteps: Tensor  # (2 * batch,)
    target: Tensor  # (2 * batch, channels, h, w) float32


def noise_pair(
    schedule: NoiseSchedule, chosen: Tensor, rejected: Tensor, noise: Tensor, timesteps: Tensor
) -> NoisedPair:
    """Give the chosen and the rejected latents (batch, channels, h, w) of a pair the same noise and timestep."""
    clean = torch.cat([chosen, rejected])
    both_noise, both_times = torch.cat([noise, noise]), torch.cat([timesteps, timesteps])
    noisy = schedule.add_noise(clean, both_noise, both_times)
    return NoisedPair(noisy, both_times, schedule.target(clean, both_noise, both_times))


def pair_errors(prediction: Tensor, target: Tensor) -> PairErrors:
    """Mean squared error of each image over its own elements, in float32, from (2 * batch, ...) halves."""
    errors = (prediction.float() - target.float()).square().flatten(1).mean(1)
    chosen, rejected = errors.chunk(2)
    return PairErrors(chosen, rejected)
