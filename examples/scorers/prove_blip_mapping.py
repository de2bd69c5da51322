"""Proof that ImageReward's own BLIP code and `ImageReward` give the same reward. See README.md.

Two steps in two environments, since its code needs transformers 4: `theirs` builds the original with random weights
and stores them in the published file's layout, with images and rewards; `ours` loads that and compares.
"""

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn

PROMPTS = ["red apple", "fox", "apple apple apple red " * 20]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "red", "apple"]


def import_blip(source: Path) -> tuple[Any, Any]:
    """Modules med and vit of ImageReward/models/BLIP, alone: their package imports downloaders and torchvision."""
    # Of torchvision, timm's PatchEmbed uses nothing; fairscale's checkpointing is for training.
    names = ["", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional"]
    for name in [f"torchvision{name}" for name in names] + ["fairscale.nn.checkpoint.checkpoint_activations"]:
        sys.modules[name] = MagicMock()
    sys.path.insert(0, str(source))
    import med
    import vit

    return med, vit


@torch.no_grad()
def theirs(source: Path, folder: Path) -> None:
    from transformers import BertTokenizer

    med, vit = import_blip(source)
    torch.manual_seed(0)
    vision = vit.VisionTransformer(img_size=64, patch_size=16, embed_dim=192, depth=3, num_heads=3)
    config = med.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        encoder_width=192,
        add_cross_attention=True,
    )
    text = med.BertModel(config=config, add_pooling_layer=False)
    head = nn.Sequential(nn.Linear(128, 16), nn.Dropout(0.2), nn.Linear(16, 4), nn.Linear(4, 1))
    parts = {"blip.visual_encoder": vision, "blip.text_encoder": text, "mlp.layers": head}
    for part in parts.values():
        for parameter in part.eval().parameters():  # every name matters: no zeros, no ones
            parameter += 0.1 * torch.randn(parameter.shape)
    state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.save(state, folder / "ImageReward.pt")
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)  # of the model's size: no resizing here
    tokens = BertTokenizer(str(folder / "vocab.txt"))(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    seen = vision((images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    read = text(
        tokens.input_ids,
        attention_mask=tokens.attention_mask,
        encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.size()[:-1], dtype=torch.long),
        return_dict=True,
    )
    rewards = (head(read.last_hidden_state[:, 0, :].float()) - 0.16717362830052426) / 1.0333394966054072
    torch.save({"images": images, "rewards": rewards.squeeze(-1)}, folder / "expected.pt")


def ours(folder: Path) -> None:
    from lit_align.scoring import ImageReward

    expected = torch.load(folder / "expected.pt", weights_only=True)
    scorer = ImageReward(str(folder), "ImageReward.pt", tokenizer_repo=str(folder))
    rewards = scorer.score(expected["images"], PROMPTS)
    difference = (rewards - expected["rewards"]).abs().max().item()
    print(f"rewards {[round(reward, 4) for reward in expected['rewards'].tolist()]}")
    print(f"max abs difference {difference:.1e}")
    assert difference < 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["theirs", "ours"])
    parser.add_argument("--folder", type=Path, required=True, help="where the two steps meet")
    parser.add_argument("--source", type=Path, help="ImageReward/models/BLIP, unpacked from the image-reward wheel")
    arguments = parser.parse_args()
    if arguments.step == "theirs":
        theirs(arguments.source, arguments.folder)
    else:
        ours(arguments.folder)


if __name__ == "__main__":
    main()
