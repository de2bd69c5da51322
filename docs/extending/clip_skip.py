"""A backbone: Stable Diffusion 1.5 whose text encoder stops a layer early, as models trained with clip skip 2 need."""

import torch
from torch import Tensor

from lit_align.backbones import StableDiffusion
from lit_align.backbones.encoders import run_text_encoder


class ClipSkip(StableDiffusion):
    """Stable Diffusion conditioned on the penultimate layer of its text encoder."""

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        (tokenizer,), (encoder,) = self.tokenizers, self.text_encoders
        output = run_text_encoder(tokenizer, encoder, prompts)
        return {"hidden": encoder.final_layer_norm(output.hidden_states[-2])}  # (batch, tokens, width)

    def prompts_identity(self) -> dict[str, str]:
        """Add the layer to the fingerprint of caches, so that a cache of another layer is refused."""
        return super().prompts_identity() | {"layer": "penultimate"}
