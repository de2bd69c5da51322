"""The discrete noise schedule of a pretrained model, and the target that it predicts."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lit_align.user_errors import UserValueError

PredictionType = Literal["epsilon", "v_prediction"]


class NoiseSchedule(nn.Module):
    """x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) noise, with alpha_t the cumulative product (DDPM, arXiv 2006.11239).

    Args:
        alphas_cumprod: (timesteps,) falling from about 1 towards 0.
        prediction_type: `epsilon` (the noise) or `v_prediction` (arXiv 2202.00512).

    Raises:
        ValueError: for any other prediction type.
    """

    alphas_cumprod: Tensor

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        super().__init__()
        if prediction_type not in get_args(PredictionType):
            raise UserValueError(
                f"The scheduler's prediction_type is {prediction_type!r}; supported are {get_args(PredictionType)}."
            )
        self.prediction_type = prediction_type
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)

    @property
    def timesteps(self) -> int:
        """Number of training timesteps."""
        return len(self.alphas_cumprod)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute x_t, (batch, ...) float32, from clean latents and noise (batch, ...) and timesteps (batch,)."""
        signal, spread = self._scales(timesteps, clean.ndim)
        return signal * clean.float() + spread * noise.float()

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute the target of the prediction, (batch, ...) float32."""
        if self.prediction_type == "epsilon":
            return noise.float()
        signal, spread = self._scales(timesteps, clean.ndim)
        return signal * noise.float() - spread * clean.float()

    def _scales(self, timesteps: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
        alpha = self.alphas_cumprod[timesteps].float().view(-1, *[1] * (dimensions - 1))
        return alpha.sqrt(), (1 - alpha).sqrt()

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # nn.Module's own signature
        """Move the schedule with its module, but keep float32: half precision would round small alphas away."""
        exact = self.alphas_cumprod
        super()._apply(fn, recurse)
        self.alphas_cumprod = exact.to(self.alphas_cumprod.device)
        return self


def uniform_timesteps(count: int, timesteps: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw `count` timesteps uniformly from 0 to `timesteps` - 1: (count,) int64."""
    return torch.randint(timesteps, (count,), generator=generator, device=device)
