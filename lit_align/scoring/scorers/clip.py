"""Agreement of image and prompt, by CLIP and by PickScore, a CLIP trained on human choices."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer

from lit_align.scoring.base import Scorer, tokenizer_digest
from lit_align.scoring.scorers.preprocessing import centre_crops


class CLIPScore(Scorer):
    """Cosine between CLIP's embeddings of image and prompt, unscaled (Hessel et al. 2021 give 2.5 max(cosine, 0)).

    Images are preprocessed by CLIP's `_transform`: bicubic to the short side, centre crop, CLIP's mean and standard
    deviation.

    Args:
        repo: hub id or local folder of a CLIPModel.
        processor_repo: hub id or local folder of its tokenizer, if it is not in `repo`.
        revision: branch, tag or commit of `repo`.
    """

    version: ClassVar[int] = 1

    def __init__(self, repo: str, processor_repo: str | None = None, revision: str | None = None) -> None:
        super().__init__()
        revision = revision or "main"
        self.model: Any = CLIPModel.from_pretrained(repo, revision=revision, dtype=torch.float32)
        source = (repo, revision) if processor_repo is None else (processor_repo, "main")
        self.tokenizer = CLIPTokenizer.from_pretrained(source[0], revision=source[1])

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        pixels = centre_crops(images, self.model.config.vision_config.image_size)
        return cosines(self.model, self.tokenizer, pixels.to(self.device, self.dtype), prompts)

    def settings(self) -> dict[str, Any]:
        return clip_settings(self.model, self.tokenizer)


class PickScore(CLIPScore):
    """exp(logit_scale) times the cosine, by a CLIP trained on Pick-a-Pic (Kirstain et al. 2023).

    Formula: model card of yuvalkirstain/PickScore_v1. Images are preprocessed as for `CLIPScore`.
    """

    version: ClassVar[int] = 1

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return self.model.logit_scale.float().exp() * super()._score(images, prompts)


def cosines(model: Any, tokenizer: CLIPTokenizer, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """Cosine (batch,) float32 between each image's and its prompt's embedding.

    Args:
        model: a CLIPModel, whose config is not fully typed.
        tokenizer: of the model.
        pixels: (batch, 3, size, size) normalised images, on the model's device and in its dtype.
        prompts: one per image.
    """
    tokens = tokenizer(
        list(prompts), padding=True, truncation=True, max_length=max_tokens(model, tokenizer), return_tensors="pt"
    )
    # No mask is needed: attention is causal, and the embedding is read at the first end token, before the padding.
    texts = model.get_text_features(tokens.input_ids.to(pixels.device)).pooler_output
    pictures = model.get_image_features(pixels).pooler_output
    return (normalize(pictures.float(), dim=-1) * normalize(texts.float(), dim=-1)).sum(-1)


def max_tokens(model: Any, tokenizer: CLIPTokenizer) -> int:
    """Greatest number of tokens in a prompt; some published tokenizers give no limit, so the model's counts too."""
    return min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)


def clip_settings(model: Any, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """Settings of a CLIPModel that decide its scores beside the weights."""
    towers = (model.config.text_config, model.config.vision_config)
    return {
        "image_size": towers[1].image_size,
        "max_tokens": max_tokens(model, tokenizer),
        "tokenizer": tokenizer_digest(tokenizer),
        "activations": [tower.hidden_act for tower in towers],
        "heads": [tower.num_attention_heads for tower in towers],
    }
