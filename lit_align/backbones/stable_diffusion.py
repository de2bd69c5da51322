"""Stable Diffusion 1.5 and 2.1: one CLIP text encoder, `epsilon` or `v_prediction`."""

from typing import Any, ClassVar

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel

from lit_align.backbones.base import Backbone
from lit_align.backbones.encoders import run_text_encoder
from lit_align.backbones.reference import Denoiser


class StableDiffusion(Backbone):
    """Stable Diffusion 1.x and 2.x (arXiv 2112.10752), which `time_ids` do not condition."""

    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    text_encoder_classes: ClassVar[dict[str, Any]] = {"text_encoder": CLIPTextModel}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"hidden": run_text_encoder(self.tokenizers[0], self.text_encoders[0], prompts).last_hidden_state}

    def _denoise(
        self, denoiser: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], time_ids: Tensor
    ) -> Tensor:
        dtype = denoiser.dtype
        return denoiser(latents.to(dtype), timesteps, conditioning["hidden"].to(dtype)).sample

    def pipeline(self) -> Any:
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoders[0],
            tokenizer=self.tokenizers[0],
            unet=self.denoiser,
            scheduler=EulerDiscreteScheduler.from_config(self.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
