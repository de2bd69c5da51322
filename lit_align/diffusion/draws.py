"""The random part of a step, as functions of seeds and numbers alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.diffusion.schedule import uniform_timesteps


class Draw(NamedTuple):
    """The same for both images of a pair."""

    noise: Tensor  # (batch, channels, h, w) float32
    timesteps: Tensor  # (batch,)
    posterior_noise: Tensor | None  # the shape of `noise`: which sample of the VAE's posterior; None for its mode


def seeded_draw(seed: int, shape: Sequence[int], timesteps: int, device: torch.device) -> Draw:
    """A draw for latents of `shape` (batch, channels, h, w) and a schedule of `timesteps`."""
    generator = torch.Generator(device).manual_seed(seed)
    noise, posterior_noise = torch.randn((2, *shape), generator=generator, device=device)
    return Draw(noise, uniform_timesteps(shape[0], timesteps, generator, device), posterior_noise)


def fixed_draw(numbers: Sequence[int], shape: Sequence[int], timesteps: int, device: torch.device) -> Draw:
    """A draw per number, for latents of `shape` (channels, h, w) each, from the posterior's mode.

    Drawn on the CPU, so that it does not depend on the device or the batch. The timesteps follow the golden ratio,
    which spreads any number of consecutive numbers evenly.
    """
    noises = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(number)) for number in numbers]
    times = [int((number + 0.5) * 0.6180339887498949 % 1 * timesteps) for number in numbers]
    return Draw(torch.stack(noises).to(device), torch.tensor(times, device=device), None)


def drop_prompts(prompts: Sequence[str], share: float, seed: int) -> list[str]:
    """The prompts, each empty with probability `share`."""
    coins = torch.rand(len(prompts), generator=torch.Generator().manual_seed(seed))  # on the CPU, where the prompts are
    return ["" if drop else prompt for prompt, drop in zip(prompts, (coins < share).tolist(), strict=True)]
