"""Encode images into latents and prompts into conditioning, with a pipeline's frozen VAE and text encoders."""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lit_align.backbones.caption_lengths import tokenize
from lit_align.backbones.encoder_parts import EncoderParts
from lit_align.common.manifest import differences, in_words
from lit_align.types import CacheOrigin, EncodedBatch, Moments, PreferenceBatch
from lit_align.user_errors import UserValueError


class Encoders(EncoderParts):
    """Encodes images and prompts of batches; images and latents can also be converted on their own."""

    _empty: dict[str, Tensor] | None = None  # memo of `empty_conditioning`
    _accepted: Mapping[str, str] | None = None  # encoders of accepted caches: digesting the own ones takes a while

    def cast_frozen(self, dtype: torch.dtype) -> None:
        self._empty = None
        super().cast_frozen(dtype)

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Encode prompts into conditioning, (batch, ...) each; the empty prompt gives the unconditional one."""

    def empty_conditioning(self) -> dict[str, Tensor]:
        """Encode the empty prompt, once for each precision and device: (1, ...) each."""
        device = next(self.parameters()).device
        if not self._empty or next(iter(self._empty.values())).device != device:
            with torch.inference_mode(False):  # the first call may come from a validation, later ones from training
                self._empty = self.encode_prompts([""])
        return self._empty

    def encode(self, batch: PreferenceBatch | EncodedBatch) -> EncodedBatch:
        """Encode the images and prompts of a batch; a batch from a cache is only checked.

        Raises:
            UserValueError: if other encoders made the cache, or if the VAE overflows.
        """
        if isinstance(batch, EncodedBatch):
            self.check_origin(batch.origin)
            return batch._replace(
                conditioning={name: value.to(self.text_dtype) for name, value in batch.conditioning.items()}
            )
        moments = self.posterior(batch.images.flatten(0, 1)).unflatten(0, batch.images.shape[:2])
        # Only half precision overflows; elsewhere looking would make each micro-batch wait for the device.
        if self.vae_precision == "fp16" and not (moments.is_meta or moments.isfinite().all()):
            first = moments.isfinite().flatten(1).all(1).tolist().index(False)
            raise self.not_finite(f"pair {batch.pairs.numbers[first]} of the data", self.vae_precision)
        conditioning = self._encode_distinct(batch.prompts)
        return EncodedBatch(Moments(moments), batch.time_ids, conditioning, self.empty_conditioning(), batch.pairs)

    def _encode_distinct(self, prompts: list[str]) -> dict[str, Tensor]:
        """Encode each distinct prompt once: pairs of one prompt often stand in one batch."""
        distinct = list(dict.fromkeys(prompts))
        conditioning = self.encode_prompts(distinct)
        if len(distinct) == len(prompts):
            return conditioning
        rows = [distinct.index(prompt) for prompt in prompts]
        return {name: value[rows] for name, value in conditioning.items()}

    def not_finite(self, where: str, precision: str) -> UserValueError:
        """Make the error for the latents of a pair, named by `where`, that are not finite in `precision`."""
        half = "The VAE overflows: choose bf16 or fp32, or a VAE that is safe in fp16 (model.backbone.vae_repo)."
        full = "Choose another VAE (model.backbone.vae_repo), or leave this pair out."
        return UserValueError(
            f"{where}: its latents are not finite in {precision}; the VAE is {self.vae_location}, and "
            f"model.backbone.vae_precision is {self.vae_precision}. {half if self.vae_precision == 'fp16' else full}"
        )

    def check_origin(self, origin: CacheOrigin | None) -> None:
        """Refuse a cache of other encoders.

        Raises:
            UserValueError: naming what differs.
        """
        if origin is None or origin.encoders == self._accepted:
            return
        if changed := differences({"encoders": origin.encoders}, {"encoders": self.encoders_identity()}):
            raise UserValueError(
                f"The cache {origin.folder} does not fit this run: {in_words(changed)}. Encode into another folder "
                "with the config of this run (lit-align encode --config ... --output ...), or restore the old values."
            )
        self._accepted = origin.encoders

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (channels, h, w) of an image's latents; height and width in pixels."""
        return self.latent_space.shape(height, width)

    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images (batch, 3, height, width) uint8 into latents (batch, channels, h, w) float32.

        Args:
            images: pixels.
            noise: standard normal, of the latents' shape, to sample from the VAE's posterior; None takes its mode.
        """
        return self.latent_space.sample(self.posterior(images), noise)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the VAE's posterior, (batch, 2, channels, h, w) float32, for uint8 images.

        The VAE computes in its own precision, outside the Trainer's autocast.
        """
        with outside_autocast(images.device):
            posterior = self.vae.encode((images.float() / 127.5 - 1).to(self.vae.dtype)).latent_dist
        return torch.stack([posterior.mean.float(), posterior.std.float()], 1)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents into images (batch, 3, height, width) uint8: the inverse of `encode_images`."""
        return to_pixels(self.decode(latents))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents without rounding: (batch, 3, height, width) float32, black -1 and white 1, not clamped."""
        restored = self.latent_space.restore(latents)
        with outside_autocast(latents.device):
            decoded: Tensor = self.vae.decode(restored.to(self.vae.dtype)).sample
        return decoded.float()


def to_pixels(values: Tensor) -> Tensor:
    """Convert values from -1 to 1 into uint8; others are clamped."""
    return ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that disables the Trainer's autocast; the meta device has none."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def run_text_encoder(tokenizer: CLIPTokenizer, encoder: nn.Module, prompts: list[str]) -> Any:
    """Run a text encoder on prompts padded or cut to the tokenizer's length.

    The encoder computes in its own precision, outside the Trainer's autocast.
    """
    ids = tokenize(tokenizer, prompts)
    device = next(encoder.parameters()).device
    with outside_autocast(device):
        return encoder(ids.to(device, non_blocking=True), output_hidden_states=True)
