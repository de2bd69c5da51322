"""Stable Diffusion XL: two text encoders, pooled text and micro-conditioning (arXiv 2307.01952)."""

from typing import Any, ClassVar

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lit_align.backbones.base import Backbone
from lit_align.backbones.encoders import run_text_encoder
from lit_align.backbones.reference import Denoiser


class StableDiffusionXL(Backbone):
    """SDXL base, conditioned on the sizes and the crop of each image (`time_ids`, in float32)."""

    pipeline_class: ClassVar[Any] = StableDiffusionXLPipeline
    text_encoder_classes: ClassVar[dict[str, Any]] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    scales_channels: ClassVar[bool] = True
    takes_sizes: ClassVar[bool] = True

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether the conditioning of an empty prompt is zeros."""
        return bool(self.pipeline_config.get("force_zeros_for_empty_prompt", True))

    def prompts_identity(self) -> dict[str, str]:
        return super().prompts_identity() | {"empty_prompt": "zeros" if self.zeros_for_empty_prompt else "encoded"}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Concatenate the penultimate hidden states of both encoders, and return the second one's pooled output.

        SDXL was trained with zeros for an empty prompt, not with an encoded empty string; the pipeline's config says
        which.
        """
        if self.zeros_for_empty_prompt and not any(prompts):
            return self._zeros(len(prompts))
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            output = run_text_encoder(tokenizer, encoder, prompts)
            hidden.append(output.hidden_states[-2])
        conditioning = {"hidden": torch.cat(hidden, dim=-1), "pooled": output.text_embeds}
        if self.zeros_for_empty_prompt and "" in prompts:
            keep = torch.tensor([prompt != "" for prompt in prompts]).to(hidden[0].device, non_blocking=True)
            return {key: value * keep.view(-1, *[1] * (value.ndim - 1)) for key, value in conditioning.items()}
        return conditioning

    def _zeros(self, count: int) -> dict[str, Tensor]:
        """Conditioning of empty prompts that are zeros: no encoder needs to run for them."""
        width, pooled = sum(config.hidden_size for config in self.text_configs), self.text_configs[-1].projection_dim
        like = next(self.text_encoders.parameters())
        hidden = like.new_zeros(count, self.tokenizers[0].model_max_length, width)
        return {"hidden": hidden, "pooled": like.new_zeros(count, pooled)}

    def _denoise(
        self, denoiser: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], time_ids: Tensor
    ) -> Tensor:
        dtype = denoiser.dtype
        added = {"text_embeds": conditioning["pooled"].to(dtype), "time_ids": time_ids.float()}
        return denoiser(latents.to(dtype), timesteps, conditioning["hidden"].to(dtype), added_cond_kwargs=added).sample

    def pipeline(self) -> Any:
        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoders[0],
            text_encoder_2=self.text_encoders[1],
            tokenizer=self.tokenizers[0],
            tokenizer_2=self.tokenizers[1],
            unet=self.denoiser,
            scheduler=EulerDiscreteScheduler.from_config(self.scheduler.config),
            force_zeros_for_empty_prompt=self.zeros_for_empty_prompt,
            add_watermarker=False,
        )
