"""Base class of all backbones: denoiser, reference, noise schedule and encoders of a pretrained pipeline."""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, ClassVar, Self

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.distributed import DeviceMesh

from lit_align.backbones.activations import checkpoint_blocks, offloaded
from lit_align.backbones.compiled import name_plainly, order_channels_last, plain_name
from lit_align.backbones.encoder_parts import DIFFUSERS_STEM, DTYPES, EncoderParts, Precision
from lit_align.backbones.encoders import Encoders
from lit_align.backbones.loading.meta import frozen_dtype, load_model
from lit_align.backbones.loading.model_configs import check_unet
from lit_align.backbones.loading.scheduler_config import load_scheduler
from lit_align.backbones.lora import LoRA
from lit_align.backbones.reference import Denoiser, FrozenAdapter, FrozenCopy, Reference, force_contiguous_proj_in
from lit_align.backbones.sharding import shard_denoiser
from lit_align.common.choices import Checkpointing
from lit_align.common.hub import ModelLocation
from lit_align.diffusion import NoisedPair, NoiseSchedule, image_errors, noise_pair, pair_errors
from lit_align.diffusion.draws import Draw
from lit_align.types import EncodedBatch, PairErrors
from lit_align.user_errors import UserValueError

__all__ = ["DTYPES", "Backbone", "Precision"]


class Backbone(Encoders):
    """A latent diffusion model of which only the denoiser, or a LoRA on it, is trained.

    Args:
        repo: hub id or local folder of a diffusers pipeline.
        vae_repo: hub id or local folder of another VAE, such as one that does not overflow in fp16.
        revision: branch, tag or commit of `repo`.
        variant: variant of the weight files in `repo`, such as `fp16`; trained weights are float32 in any case.
        lora: settings of a low-rank adapter to train instead of the whole denoiser.
        gradient_checkpointing: recompute activations in the backward pass; about a third slower, much less memory.
            `selective` keeps results of convolutions, long products and attention, and recomputes the others.
        activation_offload: activations wait for the backward pass in main memory; without effect on a CPU.
        vae_precision: precision of the VAE, independent of the Trainer's; SDXL's original VAE overflows in fp16.
        vae_slicing: encode and decode one image at a time: less memory, but slower for small images.
        channels_last: keep the weights of convolutions in channels_last order, which some devices prefer.
        compile: compile the denoiser's transformer blocks by torch.compile when a training starts; the first step, and
            the first of each further size of images, then take minutes.

    Raises:
        ValueError: if `repo` holds a pipeline of another kind.
        OSError: from diffusers, if `repo` cannot be found.
    """

    _compiled = False  # whether `compile_blocks` has had its effect
    takes_sizes: ClassVar[bool] = False  # whether the denoiser is conditioned on sizes and the pooled prompt

    def __init__(
        self,
        repo: str,
        vae_repo: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        lora: LoRA | None = None,
        gradient_checkpointing: Checkpointing = False,
        activation_offload: bool = False,
        vae_precision: Precision = "fp32",
        vae_slicing: bool = False,
        channels_last: bool = False,
        compile: bool = False,  # what users look for
    ) -> None:
        super().__init__(repo, vae_repo, revision, variant, vae_precision, vae_slicing)
        self.lora, self.lora_layers = lora, dict[str, int]()  # layers with an adapter, by the target that names them
        self.denoiser_location = ModelLocation(repo, "unet", revision, variant)
        self.check_denoiser_config(
            self.denoiser_location, UNet2DConditionModel.load_config(repo, subfolder="unet", revision=revision)
        )
        self.scheduler = load_scheduler(repo, revision, self.pipeline_config.get("scheduler", [None, None])[1])
        # NF4 rounds float32, so that a base does not depend on the precision of the run that it is loaded for.
        dtype = frozen_dtype() if lora is not None and lora.base == "compute" else torch.float32
        self.denoiser = load_model(UNet2DConditionModel, self.denoiser_location, dtype)
        self.schedule = NoiseSchedule(self.scheduler.alphas_cumprod, self.scheduler.config.prediction_type)
        self.channels_last, self.compiles = channels_last, compile
        if channels_last:
            order_channels_last(self.denoiser)
        self.requires_grad_(False)
        if lora is None:
            self.denoiser.requires_grad_(True)
        else:
            self.lora_layers = lora.add_to(self.denoiser)
        self.activation_offload = activation_offload
        checkpoint_blocks(self.denoiser, gradient_checkpointing, activation_offload, compile)
        self.train(False)
        self.reference: Reference | None = None
        name_plainly(self)

    def check_denoiser_config(self, where: object, config: Mapping[str, Any]) -> None:
        """Refuse a UNet that takes other inputs than this backbone gives it.

        Args:
            where: its folder or file.
            config: its stored config.

        Raises:
            UserValueError: naming the key and its value.
        """
        widths = [config.hidden_size for config in self.text_configs]
        pooled = self.text_configs[-1].projection_dim if self.takes_sizes else None
        check_unet(f"{where}/config.json", config, self.latent_space.config["latent_channels"], sum(widths), pooled)

    @classmethod
    def without_denoiser(cls, **arguments: Any) -> Self:
        """Build a backbone that only encodes; arguments are those of the constructor."""
        backbone = cls.__new__(cls)
        known = inspect.signature(EncoderParts.__init__).parameters
        Encoders.__init__(backbone, **{name: value for name, value in arguments.items() if name in known})
        return backbone

    def model_locations(self) -> dict[str, tuple[ModelLocation, str]]:
        return {"unet": (self.denoiser_location, DIFFUSERS_STEM), **super().model_locations()}

    @abstractmethod
    def _denoise(
        self, denoiser: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], time_ids: Tensor
    ) -> Tensor:
        """Predict with `denoiser`, see `denoise`."""

    def denoise(self, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], time_ids: Tensor) -> Tensor:
        """Predict with the policy; the prediction has the shape of `latents`.

        Args:
            latents: (batch, channels, h, w) noisy latents.
            timesteps: (batch,)
            conditioning: from `encode_prompts`, (batch, ...) each.
            time_ids: (batch, 6) int64, sizes and crop of each image in pixels, see `PreferenceBatch`.
        """
        with offloaded(self.denoiser, latents.device) if self.activation_offload else nullcontext():
            return self._denoise(self.denoiser, latents, timesteps, conditioning, time_ids)

    @torch.no_grad()
    def denoise_by_reference(
        self, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], time_ids: Tensor
    ) -> Tensor:
        """Predict with the reference, without gradients.

        Call it before `denoise`: a LoRA reference switches the policy's adapter off meanwhile.
        """
        assert self.reference is not None, "add_reference"
        with self.reference.active() as denoiser:
            return self._denoise(denoiser, latents, timesteps, conditioning, time_ids)

    def pair_errors(self, encoded: EncodedBatch, draw: Draw) -> PairErrors:
        """Compute the policy's errors of both images of each pair, in one forward pass over all images."""
        return pair_errors(*self.predict_pairs(encoded, draw))

    def predict_pairs(self, encoded: EncodedBatch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Compute the policy's prediction and its target, (2 * batch, channels, h, w) each, the chosen images first."""
        return self._predict_pairs(self.denoise, encoded, draw)

    def reference_pair_errors(self, encoded: EncodedBatch, draw: Draw) -> PairErrors:
        """Compute the reference's errors, without gradients; call it before `pair_errors`."""
        return pair_errors(*self._predict_pairs(self.denoise_by_reference, encoded, draw))

    def chosen_errors(self, encoded: EncodedBatch, draw: Draw) -> Tensor:
        """Compute the policy's errors of the chosen images alone, (batch,), at half the cost of `pair_errors`."""
        clean = self.latent_space.sample(encoded.moments.values[:, 0], draw.posterior_noise)
        noisy = self.schedule.add_noise(clean, draw.noise, draw.timesteps)
        prediction = self.denoise(noisy, draw.timesteps, encoded.conditioning, encoded.time_ids[:, 0])
        return image_errors(prediction, self.schedule.target(clean, draw.noise, draw.timesteps))

    def _predict_pairs(
        self, denoise: Callable[..., Tensor], encoded: EncodedBatch, draw: Draw
    ) -> tuple[Tensor, Tensor]:
        noised = self.noise(encoded, draw)
        conditioning = {name: torch.cat([value, value]) for name, value in encoded.conditioning.items()}
        time_ids = encoded.time_ids.transpose(0, 1).flatten(0, 1)  # chosen images first, as in `noised`
        return denoise(noised.latents, noised.timesteps, conditioning, time_ids), noised.target

    def noise(self, encoded: EncodedBatch, draw: Draw) -> NoisedPair:
        """Sample latents from the moments of both images of each pair, and add the noise of the draw."""
        chosen, rejected = (
            self.latent_space.sample(moments, draw.posterior_noise) for moments in encoded.moments.values.unbind(1)
        )
        return noise_pair(self.schedule, chosen, rejected, draw.noise, draw.timesteps)

    def add_reference(self) -> None:
        """Keep the denoiser as it is now as `reference`; a second call changes nothing."""
        if self.reference is None:
            force_contiguous_proj_in(self.denoiser)
            if self.lora is None:
                self.reference = FrozenCopy(self.denoiser)
            else:
                self.reference = FrozenAdapter(self.denoiser, self.lora.config())

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the transformer blocks of the denoiser and its frozen copy, if the backbone is to; idempotent.

        Each is compiled when it is first called, again for other widths, adapters and sizes, and without gradients.
        """
        if self.compiles and not self._compiled:
            for denoiser in (self.denoiser, *(self.reference.own_denoisers() if self.reference else [])):
                denoiser.compile_repeated_blocks(backend=backend)
            self._compiled = True

    def shard(self, mesh: DeviceMesh, dtype: torch.dtype | None, keep_for_backward: bool = False) -> None:
        """Shard the denoiser and its frozen copy over devices, see `shard_denoiser`.

        The copy has no backward pass, so `keep_for_backward` does not apply to it.

        Raises:
            ValueError: if a LoRA is trained.
        """
        if self.lora is not None:
            raise UserValueError(
                "trainer.strategy shards the weights of a whole denoiser, but model.backbone.lora is set: its frozen "
                "weights cannot be in the compute precision there. A LoRA needs little memory: set trainer.strategy "
                "to ddp."
            )
        shard_denoiser(self.denoiser, mesh, dtype, keep_for_backward)
        for denoiser in self.reference.own_denoisers() if self.reference else []:
            shard_denoiser(denoiser, mesh, dtype)

    @abstractmethod
    def pipeline(self) -> Any:
        """Build a diffusers pipeline of the current modules, for sampling."""

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode of the denoiser; frozen parts stay in eval mode."""
        super().train(False)
        self.training = mode
        self.denoiser.train(mode)
        return self

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Cast frozen weights to the compute precision and the VAE to its own.

        The reference is not cast: it must be able to equal the policy.
        """
        super().cast_frozen(dtype)
        twin = {id(weight) for weight in self.reference_weights().values()}
        for parameter in self.denoiser.parameters():
            frozen = not parameter.requires_grad and id(parameter) not in twin
            if frozen and parameter.is_floating_point():  # NF4's weights are integers
                parameter.data = parameter.data.to(dtype)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in this module."""
        return {plain_name(name): weight for name, weight in self.named_parameters() if weight.requires_grad}

    def reference_weights(self) -> dict[str, Tensor]:
        """Return the reference's own weights by their names in this module; none without a reference."""
        return {} if self.reference is None else {name: frozen for name, (frozen, _) in self.reference.pairs().items()}

    def export_info(self) -> dict[str, Any]:
        """Return what an export needs beside the trained weights; plain values only."""
        return {
            "repo": self.repo,
            "pipeline": self.pipeline_class.__name__,
            "prediction_type": self.schedule.prediction_type,
            "denoiser_config": {key: value for key, value in self.denoiser.config.items() if not key.startswith("_")},
            "lora": None if self.lora is None else asdict(self.lora),
        }
