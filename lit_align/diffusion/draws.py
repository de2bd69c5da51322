"""The random part of a step, as functions of seeds and numbers only."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.diffusion.schedule import uniform_timesteps


class Draw(NamedTuple):
    """Noise and timestep of each pair, shared by both of its images."""

    noise: Tensor  # (batch, channels, h, w) float32
    timesteps: Tensor  # (batch,)
    posterior_noise: Tensor | None  # (batch, channels, h, w): selects a sample of the VAE's posterior; None: its mode


def seeded_draw(seed: int, shape: Sequence[int], timesteps: int, device: torch.device) -> Draw:
    """Draw noise for latents of `shape` (batch, channels, h, w) and uniform timesteps below `timesteps`."""
    generator = torch.Generator(device).manual_seed(seed)
    noise, posterior_noise = torch.randn((2, *shape), generator=generator, device=device, dtype=torch.float32)
    return Draw(noise, uniform_timesteps(shape[0], timesteps, generator, device), posterior_noise)


def fixed_draw(numbers: Sequence[int], shape: Sequence[int], timesteps: int, device: torch.device) -> Draw:
    """Draw noise and a timestep for each number, for latents of `shape` (channels, h, w) at the posterior's mode.

    The draw happens on the CPU, so that it does not depend on the device or the batch. The timesteps follow the golden
    ratio, which spreads consecutive numbers evenly.
    """
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    # A half-precision run has another default dtype.
    noises = [torch.randn(tuple(shape), generator=generator, dtype=torch.float32) for generator in generators]
    times = [int((number + 0.5) * 0.6180339887498949 % 1 * timesteps) for number in numbers]
    return Draw(torch.stack(noises).to(device), torch.tensor(times, device=device), None)


def numbered_draw(seeds: Sequence[int], shape: Sequence[int], timesteps: int, device: torch.device) -> Draw:
    """Draw noise for latents of `shape` (channels, h, w) and a uniform timestep for each seed, on the CPU."""
    noises, times = list[Tensor](), list[Tensor]()
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noises.append(torch.randn((2, *shape), generator=generator, dtype=torch.float32))
        times.append(uniform_timesteps(1, timesteps, generator, torch.device("cpu")))
    noise, posterior_noise = _send(torch.stack(noises, 1), device)
    return Draw(noise, _send(torch.cat(times), device), posterior_noise)


def _send(values: Tensor, device: torch.device) -> Tensor:
    """Copy values to a device without waiting for it: CUDA waits unless they are in pinned memory."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def dropped_prompts(pairs: int, share: float, seed: int) -> Tensor:
    """Draw which of `pairs` train without their prompt, each with probability `share`: (pairs,) bool on the CPU."""
    return torch.rand(pairs, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) < share
