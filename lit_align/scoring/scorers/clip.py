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

    def _preprocess(self, images: Sequence[Tensor], size: int) -> Tensor:
        """Turn images into normalised pixels (batch, 3, size, size)."""
        return centre_crops(images, size)

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        pixels = self._preprocess(images, self.model.config.vision_config.image_size).to(self.device, self.dtype)
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self._max_tokens(), return_tensors="pt"
        )
        # No mask is needed: attention is causal, and the embedding is read at the first end token, before the padding.
        texts = self.model.get_text_features(tokens.input_ids.to(self.device)).pooler_output
        pictures = self.model.get_image_features(pixels).pooler_output
        return (normalize(pictures.float(), dim=-1) * normalize(texts.float(), dim=-1)).sum(-1)

    def _max_tokens(self) -> int:
        """Count the most tokens of a prompt; some published tokenizers give no limit, so the model's counts too."""
        return min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)

    def settings(self) -> dict[str, Any]:
        towers = (self.model.config.text_config, self.model.config.vision_config)
        return {
            "image_size": towers[1].image_size,
            "max_tokens": self._max_tokens(),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "activations": [tower.hidden_act for tower in towers],
            "heads": [tower.num_attention_heads for tower in towers],
        }


class PickScore(CLIPScore):
    """exp(logit_scale) times the cosine, by a CLIP trained on Pick-a-Pic (Kirstain et al. 2023).

    Formula: model card of yuvalkirstain/PickScore_v1. Images are preprocessed as for `CLIPScore`.
    """

    version: ClassVar[int] = 1

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return self.model.logit_scale.float().exp() * super()._score(images, prompts)
