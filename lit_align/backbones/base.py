"""The face of every pretrained model."""

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lit_align.backbones.lora import LoRA
from lit_align.backbones.reference import Denoiser, FrozenAdapter, FrozenCopy, Reference
from lit_align.diffusion import NoiseSchedule

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Backbone(nn.Module, ABC):
    """A latent diffusion model of which only the denoiser (all of it, or its LoRA) learns.

    Args:
        repo: hub id or local folder of a diffusers pipeline.
        vae_repo: hub id or local folder of another VAE, such as one that is safe in fp16.
        revision: branch, tag or commit of `repo`.
        variant: weight files' variant in `repo`, such as `fp16`; training weights are float32 all the same.
        lora: train a low-rank adapter with these settings in place of the whole denoiser.
        gradient_checkpointing: recompute activations in the backward pass; about a third slower, much less memory.
        vae_precision: the VAE's own precision, whatever the Trainer's is; SDXL's original VAE is not finite in fp16.
        vae_slicing: encode and decode one image at a time; less memory, slower where images are small.

    Raises:
        ValueError: if `repo` holds a pipeline of another kind.
        OSError: from diffusers, if it cannot be found.
    """

    pipeline_class: ClassVar[Any]  # of diffusers, whose pipelines share no typed base
    text_encoders: nn.ModuleList

    def __init__(
        self,
        repo: str,
        vae_repo: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        vae_precision: Precision = "fp32",
        vae_slicing: bool = False,
    ) -> None:
        super().__init__()
        self.repo, self.lora = repo, lora
        self.pipeline_config = self._check_pipeline(repo, revision)
        source: dict[str, Any] = {"revision": revision, "variant": variant}
        self.denoiser = UNet2DConditionModel.from_pretrained(repo, subfolder="unet", dtype=torch.float32, **source)
        vae_source = {"subfolder": "vae", **source} if vae_repo is None else {}
        self.vae_dtype = DTYPES[vae_precision]
        self.vae = AutoencoderKL.from_pretrained(vae_repo or repo, dtype=self.vae_dtype, **vae_source)
        self.vae.use_slicing = vae_slicing
        self.scheduler = DDPMScheduler.from_pretrained(repo, subfolder="scheduler", revision=revision)
        self.schedule = NoiseSchedule(self.scheduler.alphas_cumprod, self.scheduler.config.prediction_type)
        self._load_text_encoders(source)
        self._choose_trainable(lora, gradient_checkpointing)
        self.reference: Reference | None = None

    def _check_pipeline(self, repo: str, revision: str | None) -> dict[str, Any]:
        config = dict(DiffusionPipeline.load_config(repo, revision=revision))
        wanted, found = self.pipeline_class.__name__, config.get("_class_name")
        if found != wanted:
            raise ValueError(
                f"repo: {repo!r} holds a {found}, but {type(self).__name__} needs a {wanted}. "
                "Choose another model.backbone class or another repo."
            )
        return config

    def _choose_trainable(self, lora: LoRA | None, gradient_checkpointing: bool) -> None:
        self.requires_grad_(False)
        if lora is None:
            self.denoiser.requires_grad_(True)
        else:
            self.denoiser.add_adapter(lora.config())  # peft makes its own weights trainable
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.train(False)

    @abstractmethod
    def _load_text_encoders(self, source: dict[str, Any]) -> None:
        """Set `text_encoders` and the tokenizers, from `self.repo`; `source` holds revision and variant."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning of `prompts`, each value (batch, ...); the empty prompt is the unconditional one."""

    @abstractmethod
    def _denoise(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: dict[str, Tensor],
        geometry: Tensor,
    ) -> Tensor:
        """`denoiser`'s prediction, see `denoise`."""

    def denoise(self, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], geometry: Tensor) -> Tensor:
        """The policy's prediction, the shape of `latents`.

        Args:
            latents: (batch, channels, h, w) noisy latents.
            timesteps: (batch,)
            conditioning: from `encode_prompts`.
            geometry: (batch, 6) int64, sizes and crop of each image in pixels, see `PreferenceBatch`.
        """
        return self._denoise(self.denoiser, latents, timesteps, conditioning, geometry)

    @torch.no_grad()
    def denoise_by_reference(
        self, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], geometry: Tensor
    ) -> Tensor:
        """The same by the reference, without gradients; before the policy's own, see `FrozenAdapter.active`."""
        assert self.reference is not None, "add_reference"
        with self.reference.active() as denoiser:
            return self._denoise(denoiser, latents, timesteps, conditioning, geometry)

    def add_reference(self) -> None:
        """Keep the denoiser as it is now as `reference`; a second time changes nothing."""
        if self.reference is None:
            if self.lora is None:
                self.reference = FrozenCopy(self.denoiser)
            else:
                self.reference = FrozenAdapter(self.denoiser, self.lora.config())

    @abstractmethod
    def pipeline(self) -> Any:
        """A diffusers pipeline of the live modules, for sampling."""

    def train(self, mode: bool = True) -> "Backbone":
        """Frozen parts stay in eval mode whatever the mode is."""
        super().train(False)
        self.training = mode
        self.denoiser.train(mode)
        return self

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Put what never learns into the compute precision, and the VAE into its own.

        But for the reference, which must be able to equal the policy.
        """
        twin = {id(weight) for weight in self.reference_weights().values()}
        self.text_encoders.to(dtype)
        nn.Module.to(self.vae, self.vae_dtype)  # diffusers' own `to` warns of parts that this VAE does not have
        for parameter in self.denoiser.parameters():
            if not parameter.requires_grad and id(parameter) not in twin:
                parameter.data = parameter.data.to(dtype)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What learns, by its name in this module."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def reference_weights(self) -> dict[str, Tensor]:
        """What is the reference's own, by its name in this module; nothing where there is no reference."""
        return {} if self.reference is None else {name: frozen for name, (frozen, _) in self.reference.pairs().items()}

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (batch, channels, h, w) float32 of images (batch, 3, height, width) uint8.

        Sampled from the VAE's posterior by standard normal `noise` of the latents' shape, or its mode without. The
        VAE computes in its own precision, outside the Trainer's autocast.
        """
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.vae.encode((images.float() / 127.5 - 1).to(self.vae.dtype)).latent_dist
            latents = posterior.mean.float()
            if noise is not None:
                latents = latents + posterior.std.float() * noise
        mean, scale = self._latent_statistics(latents)
        # The VAE may answer in channels-last layout, in which policy and reference need not round alike.
        return ((latents - mean) * scale).contiguous()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (batch, 3, height, width) uint8: the inverse of `encode_images`."""
        mean, scale = self._latent_statistics(latents)
        with torch.autocast(latents.device.type, enabled=False):
            images = self.vae.decode((latents.float() / scale + mean).to(self.vae.dtype)).sample
        return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale per channel; most VAEs have one scale for all, some a mean and deviation per channel."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        shape = (1, -1, 1, 1)
        offset = latents.new_tensor(mean if mean is not None else [0.0]).view(shape)
        deviation = latents.new_tensor(std if std is not None else [1.0]).view(shape)
        return offset, config.scaling_factor / deviation

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, h, w) of an image's latents."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.latent_channels, height // factor, width // factor

    def export_info(self) -> dict[str, Any]:
        """What an export needs to know beside the trained weights; plain values only."""
        return {
            "repo": self.repo,
            "pipeline": self.pipeline_class.__name__,
            "denoiser_config": {key: value for key, value in self.denoiser.config.items() if not key.startswith("_")},
            "lora": None if self.lora is None else asdict(self.lora),
        }


def run_text_encoder(tokenizer: CLIPTokenizer, encoder: nn.Module, prompts: list[str]) -> Any:
    """A text encoder's output for prompts padded and cut to the tokenizer's own length.

    The encoder computes in its own precision, outside the Trainer's autocast.
    """
    tokens = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    device = next(encoder.parameters()).device
    with torch.autocast(device.type, enabled=False):
        return encoder(tokens.input_ids.to(device), output_hidden_states=True)
