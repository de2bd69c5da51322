"""The random part of a training step, drawn on a rank's own, or by the numbers of the pairs."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_align.diffusion.draws import Draw, dropped_prompts, numbered_draw, seeded_draw

# Seeds of their own: from one seed, a coin or a dropped feature would be made of the same numbers as the noise.
COINS, DROPOUT = "/coins", "/dropout"


def seed_of(place: str) -> int:
    """Return the seed of a place in a run, such as its seed, rank and micro-batch."""
    return random.Random(place).getrandbits(63)


def draw_at_rank(
    place: str, shape: Sequence[int], timesteps: int, share: float, device: torch.device
) -> tuple[Draw, Tensor]:
    """Draw for a micro-batch from its place in the run: seed, rank and number.

    Args:
        place: differs for each micro-batch.
        shape: (batch, channels, h, w) of the latents.
        timesteps: of the noise schedule.
        share: of pairs that train without their prompt.
        device: that draws; another kind of device draws other numbers.

    Returns:
        Noise and timesteps, and which pairs drop their prompt, (batch,) bool on the CPU.
    """
    draw = seeded_draw(seed_of(place), shape, timesteps, device)
    return draw, dropped_prompts(shape[0], share, seed_of(place + COINS))


def draw_by_pair(
    seed: int, epoch: int, numbers: Sequence[int], shape: Sequence[int], timesteps: int, share: float,
    device: torch.device,
) -> tuple[Draw, Tensor]:  # fmt: skip
    """Draw for each pair from seed, epoch and the pair's number: batches, ranks and devices change nothing.

    Args:
        seed: of the run.
        epoch: in which the pairs are seen.
        numbers: of the pairs in their data set.
        shape: (channels, h, w) of the latents.
        timesteps: of the noise schedule.
        share: of pairs that train without their prompt.
        device: of the result; the CPU draws.

    Returns:
        As `draw_at_rank`.
    """
    places = [f"{seed}/{epoch}/pair {number}" for number in numbers]
    draw = numbered_draw([seed_of(place) for place in places], shape, timesteps, device)
    dropped = [dropped_prompts(1, share, seed_of(place + COINS)) for place in places]
    return draw, torch.cat(dropped)
