"""Latents: sampled from the posterior by hand, and refused where the VAE overflows."""

import pytest
import torch

from lit_align.backbones import StableDiffusionXL
from lit_align.backbones.latents import LatentSpace
from lit_align.user_errors import UserValueError
from tests.support.paths import PIPELINE
from tests.support.runs import make_data

CONFIG = {"scaling_factor": 0.5, "latent_channels": 2, "block_out_channels": (8, 8)}


def test_a_sample_is_mean_plus_deviation_times_noise_and_scaled():
    mean, deviation, noise = (torch.tensor(v).view(1, 2, 1, 1) for v in ([1.0, -2.0], [3.0, 0.25], [2.0, 4.0]))
    moments = torch.stack([mean, deviation], 1)
    sample = LatentSpace(CONFIG).sample(moments, noise)
    assert sample.flatten().tolist() == [3.5, -0.5]  # 0.5 (1 + 3 * 2), 0.5 (-2 + 0.25 * 4)
    assert LatentSpace(CONFIG).sample(moments, None).flatten().tolist() == [0.5, -1.0]
    assert LatentSpace(CONFIG).sample(moments[:, :1], noise).flatten().tolist() == [0.5, -1.0]  # is a sample already


def test_channels_are_standardised_by_their_own_statistics():
    space = LatentSpace({**CONFIG, "latents_mean": [1.0, 2.0], "latents_std": [2.0, 4.0]})
    latents = torch.tensor([5.0, 10.0]).view(1, 2, 1, 1)
    standardised = space.sample(latents[:, None], None)
    assert standardised.flatten().tolist() == [1.0, 1.0]  # 0.5 (5 - 1) / 2, 0.5 (10 - 2) / 4
    assert space.restore(standardised).flatten().tolist() == [5.0, 10.0]


def test_the_posteriors_moments_are_mean_and_standard_deviation():
    """The VAE's own last layer gives means and logarithms of variances."""
    backbone = StableDiffusionXL(str(PIPELINE))
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = backbone.vae.quant_conv(backbone.vae.encoder(images.float() / 127.5 - 1))
    mean, log_variance = raw.chunk(2, dim=1)
    moments = backbone.posterior(images)
    torch.testing.assert_close(moments[:, 0], mean)
    torch.testing.assert_close(moments[:, 1], (log_variance / 2).exp())
    assert moments[:, 1].min() > 0


def test_a_vae_that_overflows_is_named_with_its_remedy():
    backbone, data = StableDiffusionXL(str(PIPELINE), vae_precision="fp16"), make_data()
    backbone.vae.quant_conv.weight.data *= 1e30
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    with pytest.raises(UserValueError) as error:
        backbone.encode(batch)
    message = str(error.value)
    assert message.startswith(f"pair {batch.pairs.numbers[0]} of the data: its latents are not finite in fp16; the VAE")
    assert f"the VAE is {PIPELINE}/vae, and model.backbone.vae_precision is fp16. The VAE overflows" in message
    assert "choose bf16 or fp32, or a VAE that is safe in fp16 (model.backbone.vae_repo)." in message
