"""The frozen half of a pretrained model: what turns images into latents and prompts into conditioning."""

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lit_align.backbones.latents import LatentSpace, complete_vae_config
from lit_align.backbones.loading.meta import load_model
from lit_align.backbones.loading.model_files import digest_tokenizer, digest_weights
from lit_align.common.hub import ModelLocation
from lit_align.types import CacheOrigin, EncodedBatch, Moments, PreferenceBatch
from lit_align.user_errors import UserValueError

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PARTS = ("vae", "text_encoders")
DIFFUSERS_STEM = "diffusion_pytorch_model"  # of its weight files


class Encoders(nn.Module, ABC):
    """VAE and text encoders of a diffusers pipeline, each loaded when it is first used.

    A run on cached pairs never uses them, and so never holds them in memory. Once loaded they are children like any
    other. Arguments and errors are those of `Backbone`.
    """

    pipeline_class: ClassVar[Any]  # of diffusers, whose pipelines share no typed base
    text_encoder_classes: ClassVar[dict[str, Any]]  # of transformers, by their folder in the pipeline

    def __init__(
        self,
        repo: str,
        vae_repo: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        vae_precision: Precision = "fp32",
        vae_slicing: bool = False,
    ) -> None:
        super().__init__()
        self.repo, self.revision, self.variant = repo, revision, variant
        self.vae_source = ModelLocation(repo, "vae", revision, variant) if vae_repo is None else ModelLocation(vae_repo)
        self.vae_precision, self.vae_dtype, self.vae_slicing = vae_precision, DTYPES[vae_precision], vae_slicing
        self.text_dtype = torch.float32  # as `cast_frozen` last set it
        self._empty: dict[str, Tensor] = {}  # memo of `empty_conditioning`
        self._accepted: CacheOrigin | None = None  # the last cache that was made by these encoders
        self.pipeline_config = self._check_pipeline()
        self._vae_config = complete_vae_config(
            AutoencoderKL.load_config(self.vae_source.repo, **self.vae_source.load_options)
        )

    def _check_pipeline(self) -> dict[str, Any]:
        config = dict(DiffusionPipeline.load_config(self.repo, revision=self.revision))
        wanted, found = self.pipeline_class.__name__, config.get("_class_name")
        if found != wanted:
            raise UserValueError(
                f"repo: {self.repo!r} holds a {found}, but {type(self).__name__} needs a {wanted}. "
                "Choose another model.backbone class or another repo."
            )
        return config

    # -- loading

    @property
    def vae(self) -> Any:
        """An AutoencoderKL, whose base classes are not typed."""
        return self._part("vae", self._load_vae)

    @property
    def text_encoders(self) -> Any:
        """A list of the text encoders, in the pipeline's order."""
        return self._part("text_encoders", self._load_text_encoders)

    @cached_property
    def tokenizers(self) -> list[Any]:
        """Those of the text encoders."""
        return [
            CLIPTokenizer.from_pretrained(source.repo, **source.load_options) for source in self._tokenizer_sources()
        ]

    def _part(self, name: str, load: Callable[[], nn.Module]) -> Any:
        if name not in self._modules:
            device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
            with torch.inference_mode(False):  # a validation may be the first to ask
                part = load().requires_grad_(False).eval()
                setattr(self, name, nn.Module.to(part, device))  # diffusers' own `to` warns of parts that are not here
        return self._modules[name]

    def _load_vae(self) -> nn.Module:
        vae: Any = load_model(AutoencoderKL, self.vae_source, self.vae_dtype)
        vae.use_slicing = self.vae_slicing
        return vae

    def _load_text_encoders(self) -> nn.Module:
        classes = zip(self.text_encoder_classes.values(), self._text_sources(), strict=True)
        return nn.ModuleList(load_model(encoder, source, torch.float32) for encoder, source in classes).to(
            self.text_dtype
        )

    def _text_sources(self) -> list[ModelLocation]:
        return [ModelLocation(self.repo, folder, self.revision, self.variant) for folder in self.text_encoder_classes]

    def _tokenizer_sources(self) -> list[ModelLocation]:
        folders = [folder.replace("text_encoder", "tokenizer") for folder in self.text_encoder_classes]
        return [ModelLocation(self.repo, folder, self.revision) for folder in folders]

    def sources(self) -> dict[str, tuple[ModelLocation, str]]:
        """Where each model comes from, by its folder in the pipeline, and what its weight files are called."""
        texts = zip(self.text_encoder_classes, self._text_sources(), strict=True)
        return {"vae": (self.vae_source, DIFFUSERS_STEM)} | {name: (source, "model") for name, source in texts}

    def load_encoders(self) -> None:
        """Load what is not loaded yet: what is missing is found now, not in the middle of the work."""
        for part in ("tokenizers", *PARTS):
            getattr(self, part)

    def loaded_encoders(self) -> list[nn.Module]:
        """Those of VAE and text encoders that are in memory."""
        return [part for name in PARTS if (part := self._modules.get(name)) is not None]

    @contextmanager
    def borrowed_encoders(self) -> Iterator[None]:
        """A context that frees, at its end, the encoders that were loaded inside it."""
        before = set(self._modules)
        try:
            yield
        finally:
            borrowed = {name for name in PARTS if name in self._modules} - before
            for name in borrowed:
                del self._modules[name]
            if borrowed:
                gc.collect()  # a pipeline and its modules know each other

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Cast the text encoders to the compute precision and the VAE to its own, now or when they load."""
        self.text_dtype = dtype
        self._empty = {}
        if "text_encoders" in self._modules:
            self.text_encoders.to(dtype)
        if "vae" in self._modules:
            nn.Module.to(self.vae, self.vae_dtype)

    def encoders_identity(self) -> dict[str, str]:
        """Which encoders these are, from the files that they load from: a cache belongs to these and no other.

        Raises:
            OSError: if a file is missing.
        """
        return {
            "backbone": type(self).__name__,
            "vae": digest_weights(self.vae_source, DIFFUSERS_STEM),
            "vae_precision": self.vae_precision,
            "text_encoders": " ".join(digest_weights(source, "model") for source in self._text_sources()),
            **self.prompts_identity(),
        }

    def prompts_identity(self) -> dict[str, str]:
        """What becomes of prompts before the text encoders read them, from the files as above; no weights are read."""
        return {"tokenizers": " ".join(map(digest_tokenizer, self._tokenizer_sources()))}

    # -- prompts

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning of `prompts`, each value (batch, ...); the empty prompt is the unconditional one."""

    def empty_conditioning(self) -> dict[str, Tensor]:
        """Encode the empty prompt, once for each precision and device: (1, ...) each."""
        device = next(self.parameters()).device
        if not self._empty or next(iter(self._empty.values())).device != device:
            self._empty = self.encode_prompts([""])
        return self._empty

    # -- batches

    def encode(self, batch: PreferenceBatch | EncodedBatch) -> EncodedBatch:
        """Encode the images and prompts of a batch; a batch from a cache is only checked.

        Raises:
            UserValueError: if other encoders made the cache.
        """
        if isinstance(batch, EncodedBatch):
            self._check_origin(batch.origin)
            return batch._replace(
                conditioning={name: value.to(self.text_dtype) for name, value in batch.conditioning.items()}
            )
        moments = self.posterior(batch.images.flatten(0, 1)).unflatten(0, batch.images.shape[:2])
        conditioning = self.encode_prompts(batch.prompts)
        return EncodedBatch(Moments(moments), batch.time_ids, conditioning, self.empty_conditioning(), batch.pairs)

    def _check_origin(self, origin: CacheOrigin | None) -> None:
        if origin is None or origin == self._accepted:
            return
        known, own = origin.encoders, self.encoders_identity()
        changed = [f'encoders.{k} was "{known.get(k)}", is "{own[k]}"' for k in own if known.get(k) != own[k]]
        if changed:
            raise UserValueError(
                f"The cache {origin.folder} does not fit this run: {'; '.join(changed)}. Encode into another folder "
                "with the config of this run (lit-align encode --config ... --output ...), or restore the old values."
            )
        self._accepted = origin

    # -- images

    @property
    def latent_space(self) -> LatentSpace:
        """Shape and scale of the VAE's latents; the VAE itself is not needed."""
        return LatentSpace(self.vae.config if "vae" in self._modules else self._vae_config)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, h, w) of an image's latents."""
        return self.latent_space.shape(height, width)

    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (batch, channels, h, w) float32 of images (batch, 3, height, width) uint8.

        Sampled from the VAE's posterior by standard normal `noise` of the latents' shape, or its mode without.
        """
        return self.latent_space.sample(self.posterior(images), noise)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        """(batch, 2, channels, h, w) float32: mean and standard deviation that the VAE gives to uint8 images.

        The VAE computes in its own precision, outside the Trainer's autocast.
        """
        with outside_autocast(images.device):
            posterior = self.vae.encode((images.float() / 127.5 - 1).to(self.vae.dtype)).latent_dist
        return torch.stack([posterior.mean.float(), posterior.std.float()], 1)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (batch, 3, height, width) uint8: the inverse of `encode_images`."""
        return to_pixels(self.decode(latents))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The same before it is rounded: (batch, 3, height, width) float32, black -1 and white 1, or beyond."""
        restored = self.latent_space.restore(latents)
        with outside_autocast(latents.device):
            decoded: Tensor = self.vae.decode(restored.to(self.vae.dtype)).sample
        return decoded.float()


def to_pixels(values: Tensor) -> Tensor:
    """Values from -1 to 1 as uint8; those beyond are cut off."""
    return ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context without the Trainer's autocast; the meta device never has one."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def run_text_encoder(tokenizer: CLIPTokenizer, encoder: nn.Module, prompts: list[str]) -> Any:
    """A text encoder's output for prompts padded and cut to the tokenizer's own length.

    The encoder computes in its own precision, outside the Trainer's autocast.
    """
    tokens = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    device = next(encoder.parameters()).device
    with outside_autocast(device):
        return encoder(tokens.input_ids.to(device), output_hidden_states=True)
