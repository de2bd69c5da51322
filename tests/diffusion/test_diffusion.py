"""The forward process: identities, and agreement with diffusers' schedulers."""

import pytest
import torch
from diffusers import DDPMScheduler

from lit_align.diffusion import NoiseSchedule, noise_pair, pair_errors


def make(prediction_type):
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    return scheduler, NoiseSchedule(scheduler.alphas_cumprod, prediction_type)


@pytest.fixture
def latents():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 5, 4, 8, 8, generator=generator)
    return clean, noise, torch.tensor([0, 1, 500, 998, 999])


def test_noise_and_targets_agree_with_diffusers(latents):
    clean, noise, times = latents
    scheduler, schedule = make("v_prediction")
    torch.testing.assert_close(schedule.add_noise(clean, noise, times), scheduler.add_noise(clean, noise, times))
    torch.testing.assert_close(schedule.target(clean, noise, times), scheduler.get_velocity(clean, noise, times))
    assert torch.equal(make("epsilon")[1].target(clean, noise, times), noise)


def test_velocity_and_noisy_latents_give_back_clean_and_noise(latents):
    clean, noise, times = latents
    schedule = make("v_prediction")[1]
    noisy, velocity = schedule.add_noise(clean, noise, times), schedule.target(clean, noise, times)
    alpha = schedule.alphas_cumprod[times].view(-1, 1, 1, 1)
    torch.testing.assert_close(alpha.sqrt() * noisy - (1 - alpha).sqrt() * velocity, clean)
    torch.testing.assert_close((1 - alpha).sqrt() * noisy + alpha.sqrt() * velocity, noise)


def test_pair_shares_noise_and_timestep(latents):
    clean, noise, times = latents
    schedule = make("epsilon")[1]
    pair = noise_pair(schedule, clean, -clean, noise, times)
    chosen, rejected = pair.latents.chunk(2)
    alpha = schedule.alphas_cumprod[times].view(-1, 1, 1, 1)
    torch.testing.assert_close((chosen + rejected) / 2, (1 - alpha).sqrt() * noise)
    assert torch.equal(pair.timesteps, torch.cat([times, times]))
    assert torch.equal(pair.target, torch.cat([noise, noise]))


def test_errors_are_means_over_each_image_in_float32():
    prediction = torch.zeros(4, 1, 2, 2, dtype=torch.bfloat16)
    target = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    errors = pair_errors(prediction, target)
    assert errors.chosen.tolist() == [1, 4]
    assert errors.rejected.tolist() == [9, 16]
    assert errors.chosen.dtype == torch.float32


def test_schedule_stays_in_float32():
    schedule = make("epsilon")[1]
    exact = schedule.alphas_cumprod.clone()
    assert torch.equal(schedule.to(torch.bfloat16).alphas_cumprod, exact)


def test_unknown_prediction_type_is_named():
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        NoiseSchedule(torch.ones(10), "sample")
