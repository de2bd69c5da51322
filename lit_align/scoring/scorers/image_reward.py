"""ImageReward: BLIP's text encoder attends to the image, and a linear head turns its output into a reward."""

import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from lit_align.common.hub import ModelLocation
from lit_align.scoring.base import Scorer, tokenizer_digest
from lit_align.scoring.scorers.aesthetic import LinearHead
from lit_align.scoring.scorers.preprocessing import centre_crops
from lit_align.scoring.scorers.weights import build, read_state_dict
from lit_align.user_errors import UserValueError

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's outputs, ImageReward/ImageReward.py
MAX_TOKENS = 35  # ImageReward/ImageReward.py, `score`
HEAD_WIDTH = 64  # of each attention head, in BERT-base as in ViT-L


class ImageReward(Scorer):
    """Reward, about -2 to 2; mean 0 and standard deviation 1 on its training prompts (Xu et al. 2023).

    Follows ImageReward/ImageReward.py: images pass CLIP's `_transform`, prompts are padded or cut to 35 tokens.

    Args:
        repo: hub id or local folder that holds `filename`.
        filename: state dict in ImageReward's layout.
        tokenizer_repo: hub id or local folder of BERT's uncased tokenizer.
        revision: branch, tag or commit of `repo`.
    """

    version: ClassVar[int] = 1

    def __init__(self, repo: str, filename: str, tokenizer_repo: str, revision: str | None = None) -> None:
        super().__init__()
        source = f"{repo}/{filename}"
        vision, text, head = blip_state_dicts(read_state_dict(ModelLocation(repo, revision=revision).require(filename)))
        try:
            vision_config, text_config = _vision_config(vision), _text_config(text)
        except KeyError as error:
            raise UserValueError(
                f"{source} lacks the weight {error}. Choose the file that ImageReward publishes."
            ) from error
        self.vision = build(BlipVisionModel, vision_config, vision, source)
        self.text = build(BlipTextModel, text_config, text, source, add_pooling_layer=False)
        self.head = LinearHead(head)
        self.tokenizer = BertTokenizer.from_pretrained(tokenizer_repo)

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        pixels = centre_crops(images, self.vision.config.image_size).to(self.device, self.dtype)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        read = self.text(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=self.vision(pixels).last_hidden_state,
        )
        return (self.head(read.last_hidden_state[:, 0]) - MEAN) / STD

    def settings(self) -> dict[str, Any]:
        return {"max_tokens": MAX_TOKENS, "tokenizer": tokenizer_digest(self.tokenizer)}


PARTS = {"blip.visual_encoder.": "vision", "blip.text_encoder.": "text", "mlp.layers.": "head"}
# Pretraining heads, momentum copies and queues of BLIP: the reward does not use them.
UNUSED = re.compile(r"blip\.(.*_proj|.*_m|.*queue|ptr_queue|queue_ptr|temp|itm_head|text_decoder)(\..*)?")
VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
IN_BLOCK = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
VISION_NAME = re.compile(r"(?:blocks\.(?P<block>\d+)\.)?(?P<name>.+?)(?P<kind>\.weight|\.bias)?")


def blip_state_dicts(image_reward: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Split ImageReward's weights into those of BlipVisionModel, BlipTextModel and LinearHead, by their names there.

    BERT's names are equal in both layouts; `build` refuses unknown ones. Layout: ImageReward/models/BLIP/{vit,med}.py.

    Raises:
        ValueError: if a name belongs to none of the three, or if one of them has no weights.
    """
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    for name, value in image_reward.items():
        prefix = next((prefix for prefix in PARTS if name.startswith(prefix)), None)
        if prefix is None and not UNUSED.fullmatch(name):
            raise UserValueError(f"State dict: {name!r} is not a weight of ImageReward. Choose the file it publishes.")
        if prefix is not None:
            own = name.removeprefix(prefix)
            parts[PARTS[prefix]][_vision_name(own) if prefix == "blip.visual_encoder." else own] = value
    for prefix, part in PARTS.items():
        if not parts[part]:
            raise UserValueError(f"State dict: no weight {prefix}*. Choose the file that ImageReward publishes.")
    return parts["vision"], parts["text"], parts["head"]


def _vision_name(name: str) -> str:
    match = VISION_NAME.fullmatch(name)
    assert match  # the pattern matches any name
    table = VISION if match["block"] is None else IN_BLOCK
    if match["name"] not in table:
        raise UserValueError(f"State dict: blip.visual_encoder.{name} is not a weight of BLIP's vision transformer.")
    layer = "" if match["block"] is None else f"encoder.layers.{match['block']}."
    return layer + table[match["name"]] + (match["kind"] or "")


def _layers(state_dict: dict[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[2] for name in state_dict if name.startswith(prefix)})


def _vision_config(state_dict: dict[str, Tensor]) -> BlipVisionConfig:
    width, _, patch_size, _ = state_dict["embeddings.patch_embedding.weight"].shape
    patches = state_dict["embeddings.position_embedding"].shape[1] - 1  # without the class token's
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state_dict["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers(state_dict, "encoder.layers."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch_size * math.isqrt(patches),
        patch_size=patch_size,
        layer_norm_eps=1e-6,  # vit.py; transformers' default is 1e-5
    )


def _text_config(state_dict: dict[str, Tensor]) -> BlipTextConfig:
    vocabulary, width = state_dict["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=state_dict["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=state_dict["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_layers(state_dict, "encoder.layer."),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=state_dict["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,  # BERT's, train/src/config/med_config.json
        is_decoder=True,  # enables cross attention in transformers; the mask stays bidirectional
    )
