"""Proof that `clip_state_dict` maps open_clip's own model: same images and texts, same features. See README.md."""

import argparse
import sys
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from lit_align.scoring.scorers.hps import clip_state_dict
from lit_align.scoring.scorers.weights import build

SMALL = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 56, "layers": 3, "width": 160, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 16, "vocab_size": 600, "width": 96, "heads": 4, "layers": 2},
}


def import_open_clip() -> Any:
    """open_clip without torchvision, of which CLIP itself uses nothing: data transforms, and a norm of ResNets."""
    for name in ("torchvision", "torchvision.ops.misc", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = MagicMock()
    import open_clip

    return open_clip


def clip_config(cfg: dict[str, Any]) -> CLIPConfig:
    """What the hub's config.json of laion/CLIP-ViT-H-14-laion2B-s32B-b79K says of the same architecture."""
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    common: dict[str, Any] = {"hidden_act": "gelu", "projection_dim": cfg["embed_dim"]}
    return CLIPConfig(
        projection_dim=cfg["embed_dim"],
        vision_config={
            **common,
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        text_config={
            **common,
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "eos_token_id": 2,  # as in old configs: the embedding is read at the greatest token, as open_clip does
        },
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the whole ViT-H/14, about 12 GB of memory")
    full = parser.parse_args().full
    open_clip = import_open_clip()
    cfg = open_clip.get_model_config("ViT-H-14") if full else SMALL
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**cfg).eval()
    for parameter in theirs.parameters():  # biases and norms start at 0 and 1, where a wrong name would not show
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn(parameter.shape)
    ours = build(CLIPModel, clip_config(cfg), clip_state_dict(theirs.state_dict()), "open_clip")
    size, text = cfg["vision_cfg"]["image_size"], cfg["text_cfg"]
    images = torch.randn(4, 3, size, size)
    tokens = torch.randint(1, text["vocab_size"] - 1, (4, text["context_length"]))
    for row, end in enumerate((3, 7, 11, 15)):
        tokens[row, end], tokens[row, end + 1 :] = text["vocab_size"] - 1, 0  # the end token, padding
    pairs = {
        "image": (theirs.encode_image(images), ours.get_image_features(images).pooler_output),
        "text": (theirs.encode_text(tokens), ours.get_text_features(tokens).pooler_output),
    }
    count = sum(parameter.numel() for parameter in theirs.parameters())
    print(f"open_clip {open_clip.__version__}, {'ViT-H-14' if full else 'small'}, {count:,} parameters")
    for name, features in pairs.items():
        a, b = (nn.functional.normalize(feature, dim=-1) for feature in features)
        difference, spread = (a - b).abs().max().item(), (a[0] - a[1]).abs().max().item()
        print(f"{name:5} features: max abs difference {difference:.1e}, between two inputs {spread:.1e}")
        assert difference < 1e-5 < spread, f"{name} features differ"


if __name__ == "__main__":
    main()
