"""Draws: every timestep is reached, and noise is a function of the numbers that it must depend on."""

import pytest
import torch

from lit_align.diffusion.draws import dropped_prompts, fixed_draw, seeded_draw

CPU = torch.device("cpu")


def test_a_random_draw_reaches_every_timestep_equally_often():
    times = seeded_draw(0, (8000, 1, 1, 1), 8, CPU).timesteps
    counts = torch.bincount(times, minlength=8)
    assert len(counts) == 8
    assert counts.tolist() == pytest.approx([1000] * 8, abs=120)  # four standard deviations


def test_fixed_draws_reach_every_timestep_equally_often():
    times = fixed_draw(range(3000), (1, 1, 1), 1000, CPU).timesteps
    counts = torch.bincount(times, minlength=1000)
    assert len(counts) == 1000
    assert (counts.min(), counts.max()) == (2, 4)


def test_fixed_draws_of_different_numbers_do_not_overlap():
    noise = fixed_draw(range(6), (4, 8, 8), 1000, CPU).noise.flatten(1)
    for first in range(6):
        for second in range(first):
            assert torch.isin(noise[first], noise[second]).sum() < 3  # of 256, some may meet by chance


def test_a_fixed_draw_depends_on_its_number_alone():
    several, alone = fixed_draw([5, 9, 7], (4, 8, 8), 1000, CPU), fixed_draw([7], (4, 8, 8), 1000, CPU)
    assert torch.equal(several.noise[2], alone.noise[0])
    assert several.timesteps[2] == alone.timesteps[0]


def test_noise_is_standard_normal_and_not_the_posteriors():
    draw = seeded_draw(3, (64, 4, 16, 16), 1000, CPU)
    for noise in (draw.noise, draw.posterior_noise):
        assert noise.mean() == pytest.approx(0, abs=0.02)
        assert noise.std() == pytest.approx(1, abs=0.02)
    assert (draw.noise * draw.posterior_noise).mean() == pytest.approx(0, abs=0.02)


def test_prompts_are_dropped_at_their_share():
    assert dropped_prompts(10_000, 0.2, 1).sum().item() == pytest.approx(2000, abs=160)  # four standard deviations
    assert not dropped_prompts(100, 0.0, 1).any()
    assert dropped_prompts(100, 1.0, 1).all()
