"""VAE, text encoders and tokenizers of a diffusers pipeline: loading on first use, precision and identity."""

import gc
from abc import ABC
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn
from transformers import CLIPTokenizer

from lit_align.backbones.latents import LatentSpace
from lit_align.backbones.loading.meta import load_model
from lit_align.backbones.loading.model_configs import check_parts, check_text_encoder, check_tokenizer, check_vae
from lit_align.backbones.loading.model_files import digest_tokenizer, digest_weights
from lit_align.common.choices import Precision
from lit_align.common.hub import ModelLocation
from lit_align.user_errors import UserValueError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PARTS = ("vae", "text_encoders")
UNET, TOKENIZERS = "UNet2DConditionModel", ("CLIPTokenizer", "CLIPTokenizerFast")  # classes in `model_index.json`
DIFFUSERS_STEM = "diffusion_pytorch_model"  # name of diffusers' weight files


class EncoderParts(nn.Module, ABC):
    """VAE and text encoders of a diffusers pipeline, each loaded when it is first used.

    A run on cached pairs never loads them. Once loaded they are ordinary submodules. Arguments and errors are those of
    `Backbone`.
    """

    pipeline_class: ClassVar[Any]  # of diffusers, whose pipelines share no typed base
    text_encoder_classes: ClassVar[dict[str, Any]]  # classes of transformers, by folder in the pipeline
    scales_channels: ClassVar[bool] = False  # whether the pipeline's class uses a VAE's mean and deviation per channel

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
        own_vae = ModelLocation(repo, "vae", revision, variant)
        self.vae_location = own_vae if vae_repo is None else ModelLocation(vae_repo)
        self.vae_precision, self.vae_dtype, self.vae_slicing = vae_precision, DTYPES[vae_precision], vae_slicing
        self.text_dtype = torch.float32  # as `cast_frozen` last set it
        self.pipeline_config = self._check_pipeline()
        self._vae_config = check_vae(self.vae_location, None if vae_repo is None else own_vae, self.scales_channels)
        self.text_configs = [check_text_encoder(location) for location in self._text_locations()]

    def _check_pipeline(self) -> dict[str, Any]:
        config = dict(DiffusionPipeline.load_config(self.repo, revision=self.revision))
        wanted, found = self.pipeline_class.__name__, config.get("_class_name")
        if found != wanted:
            raise UserValueError(
                f"repo: {self.repo!r} holds a {found}, but {type(self).__name__} needs a {wanted}. "
                "Choose another model.backbone class or another repo."
            )
        texts = {name: (kind.__name__,) for name, kind in self.text_encoder_classes.items()}
        tokenizers = {name.replace("text_encoder", "tokenizer"): TOKENIZERS for name in texts}
        check_parts(self.repo, config, {"unet": (UNET,), "vae": (AutoencoderKL.__name__,), **texts, **tokenizers})
        return config

    @property
    def vae(self) -> Any:
        """The AutoencoderKL, whose base classes are not typed."""
        return self._part("vae", self._load_vae)

    @property
    def text_encoders(self) -> Any:
        """The text encoders as a list, in the pipeline's order."""
        return self._part("text_encoders", self._load_text_encoders)

    @cached_property
    def tokenizers(self) -> list[Any]:
        """The tokenizers of the text encoders, in their order."""
        locations = self._tokenizer_locations()
        found = [CLIPTokenizer.from_pretrained(location.repo, **location.load_options) for location in locations]
        for tokenizer, location, config in zip(found, locations, self.text_configs, strict=True):
            check_tokenizer(tokenizer, location, config)
        return found

    @property
    def latent_space(self) -> LatentSpace:
        """Shape and scale of the VAE's latents, known without loading the VAE."""
        return LatentSpace(self.vae.config if "vae" in self._modules else self._vae_config)

    def _part(self, name: str, load: Callable[[], nn.Module]) -> Any:
        if name not in self._modules:
            device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
            with torch.inference_mode(False):  # the first use may be in a validation
                part = load().requires_grad_(False).eval()
                setattr(self, name, nn.Module.to(part, device))  # diffusers' own `to` warns about missing parts
        return self._modules[name]

    def _load_vae(self) -> nn.Module:
        vae: Any = load_model(AutoencoderKL, self.vae_location, self.vae_dtype)
        vae.use_slicing = self.vae_slicing
        return vae

    def _load_text_encoders(self) -> nn.Module:
        classes = zip(self.text_encoder_classes.values(), self._text_locations(), strict=True)
        return nn.ModuleList([load_model(encoder, location, self.text_dtype) for encoder, location in classes])

    def _text_locations(self) -> list[ModelLocation]:
        return [ModelLocation(self.repo, folder, self.revision, self.variant) for folder in self.text_encoder_classes]

    def _tokenizer_locations(self) -> list[ModelLocation]:
        folders = [folder.replace("text_encoder", "tokenizer") for folder in self.text_encoder_classes]
        return [ModelLocation(self.repo, folder, self.revision) for folder in folders]

    def model_locations(self) -> dict[str, tuple[ModelLocation, str]]:
        """Return location and name of the weight files of each model, by its folder in the pipeline."""
        texts = zip(self.text_encoder_classes, self._text_locations(), strict=True)
        return {"vae": (self.vae_location, DIFFUSERS_STEM)} | {name: (location, "model") for name, location in texts}

    def load_encoders(self) -> None:
        """Load all parts now, so that a missing file ends the run at its start."""
        for part in ("tokenizers", *PARTS):
            getattr(self, part)

    def loaded_encoders(self) -> list[nn.Module]:
        """List VAE and text encoders as far as they are in memory."""
        return [part for name in PARTS if (part := self._modules.get(name)) is not None]

    @contextmanager
    def borrowed_encoders(self) -> Iterator[None]:
        """Free encoders that were loaded in this context at its end."""
        before = set(self._modules)
        try:
            yield
        finally:
            borrowed = {name for name in PARTS if name in self._modules} - before
            for name in borrowed:
                del self._modules[name]
            if borrowed:
                gc.collect()  # a pipeline and its modules refer to each other

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Cast the text encoders to the compute precision and the VAE to its own, now or when they load."""
        self.text_dtype = dtype
        if "text_encoders" in self._modules:
            self.text_encoders.to(dtype)
        if "vae" in self._modules:
            nn.Module.to(self.vae, self.vae_dtype)

    def encoders_identity(self) -> dict[str, str]:
        """Digest the encoders' files: a cache belongs to exactly these encoders.

        Raises:
            OSError: if a file is missing.
        """
        return {
            "backbone": type(self).__name__,
            "vae": digest_weights(self.vae_location, DIFFUSERS_STEM),
            "vae_precision": self.vae_precision,
            "text_encoders": " ".join(digest_weights(location, "model") for location in self._text_locations()),
            **self.prompts_identity(),
        }

    def prompts_identity(self) -> dict[str, str]:
        """Digest the tokenizers' files. Reads no weights."""
        return {"tokenizers": " ".join(map(digest_tokenizer, self._tokenizer_locations()))}
