"""Human Preference Score v2: a CLIP ViT-H/14 trained on human choices, published in open_clip's layout."""

import re
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from lit_align.common.hub import ModelLocation
from lit_align.scoring.base import Scorer
from lit_align.scoring.scorers.clip import CLIPScore
from lit_align.scoring.scorers.preprocessing import padded_squares
from lit_align.scoring.scorers.weights import build, read_state_dict
from lit_align.user_errors import UserValueError


class HPSv2(CLIPScore):
    """Cosine between image and prompt by HPSv2 or HPSv2.1 (Wu et al. 2023), which only differ in their weights.

    Follows hpsv2/img_score.py, which asks open_clip for `light_augmentation=True` and `with_region_predictor=False`:
    images pass `resize_longest_max` (long side to 224, black padding) instead of CLIP's centre crop. Prompts get CLIP's
    tokens; open_clip also repairs broken Unicode and HTML entities in them (ftfy), which is left out here.

    Args:
        repo: hub id or local folder that holds `filename`.
        filename: state dict in open_clip's layout.
        config_repo: hub id or local folder of a CLIPModel of this architecture, for config and tokenizer.
        revision: branch, tag or commit of `repo`.
    """

    version: ClassVar[int] = 1

    def __init__(self, repo: str, filename: str, config_repo: str, revision: str | None = None) -> None:
        Scorer.__init__(self)
        weights = clip_state_dict(read_state_dict(ModelLocation(repo, revision=revision).require(filename)))
        self.model = build(CLIPModel, CLIPConfig.from_pretrained(config_repo), weights, f"{repo}/{filename}")
        self.tokenizer = CLIPTokenizer.from_pretrained(config_repo)

    def _preprocess(self, images: Sequence[Tensor], size: int) -> Tensor:
        return padded_squares(images, size)


TOWERS = {"": "text_model.", "visual.": "vision_model."}  # open_clip's text tower has no prefix
OUTSIDE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
TRANSPOSED = {"text_projection", "visual.proj"}  # open_clip computes x @ p, transformers a Linear
IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def clip_state_dict(open_clip: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of open_clip's CLIP with a vision transformer to those of transformers' CLIPModel.

    Layout: open_clip's model.py and transformer.py; verified in examples/scorers.

    Raises:
        ValueError: if a name does not belong to that layout.
    """
    mapped: dict[str, Tensor] = {}
    for name, value in open_clip.items():
        match = LAYER.fullmatch(name)
        if name in OUTSIDE:
            mapped[OUTSIDE[name]] = (value.T if name in TRANSPOSED else value).contiguous()
        elif match and (match[3] == "attn.in_proj" or match[3] in IN_LAYER):
            layer = f"{TOWERS[match[1] or '']}encoder.layers.{match[2]}."
            if match[3] == "attn.in_proj":
                for part, slice_ in zip("qkv", value.chunk(3), strict=True):
                    mapped[f"{layer}self_attn.{part}_proj.{match[4]}"] = slice_.contiguous()
            else:
                mapped[f"{layer}{IN_LAYER[match[3]]}.{match[4]}"] = value
        elif name != "attn_mask":  # a constant that older versions of open_clip saved
            raise UserValueError(
                f"State dict: {name!r} is not a weight of open_clip's CLIP with a vision transformer. "
                "Choose the file that HPSv2 publishes, such as HPS_v2.1_compressed.pt."
            )
    return mapped
