"""Shape and scale of a VAE's latents, from its config alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LatentSpace:
    """Converts between a VAE's latents and standardised latents, in which the denoiser works.

    Args:
        config: config of an AutoencoderKL.
    """

    config: Mapping[str, Any]

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (channels, h, w) of an image's latents; height and width in pixels."""
        factor = 2 ** (len(self.config["block_out_channels"]) - 1)
        return self.config["latent_channels"], height // factor, width // factor

    def sample(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """Sample standardised latents (batch, channels, h, w) float32.

        Args:
            moments: (batch, 2, channels, h, w) mean and standard deviation of a posterior, or (batch, 1, ...) a sample,
                to which no noise is added.
            noise: (batch, channels, h, w) standard normal; None takes the posterior's mode.
        """
        latents = moments[:, 0].float()
        if noise is not None and moments.shape[1] == 2:
            latents = latents + moments[:, 1].float() * noise
        mean, scale = self._statistics(latents)
        # The VAE may return channels-last tensors, for which policy and reference may round differently.
        return ((latents - mean) * scale).contiguous()

    def restore(self, latents: Tensor) -> Tensor:
        """Convert standardised latents back into those that the VAE decodes."""
        mean, scale = self._statistics(latents)
        return latents.float() / scale + mean

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale per channel; most VAEs have one scale, some a mean and standard deviation per channel."""
        mean, std, shape = self.config.get("latents_mean"), self.config.get("latents_std"), (1, -1, 1, 1)
        offset = latents.new_tensor(mean if mean is not None else [0.0]).view(shape)
        deviation = latents.new_tensor(std if std is not None else [1.0]).view(shape)
        return offset, self.config["scaling_factor"] / deviation
