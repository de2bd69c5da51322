"""Scoring by a scorer of HPSv2's size with random weights, beside a plain loop of its model alone."""

from typing import Any

import torch
import yaml
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from benchmarks.accelerator_rates import calls_per_second, now
from benchmarks.accelerator_record import Facts
from benchmarks.accelerator_site import Site
from benchmarks.full_size import TOKENIZER, TOKENS
from lit_align.commands.score.scoring import LoadedScorer, ShardToScore, score_shards
from lit_align.data.labels.score_files import Identity
from lit_align.data.read_options import ReadOptions
from lit_align.scoring import HPSv2
from lit_align.scoring.base import Scorer
from lit_align.scoring.presets import load_scorers
from lit_align.scoring.scorers.weights import build

BATCH = 16  # pairs, the default of `lit-align score`
NAME = "random"
# laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which HPSv2, HPSv2.1 and PickScore have in common.
TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
PIXELS = {"image_size": 224, "patch_size": 14}
TOY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDTH = 1024  # of the embeddings


class RandomHPSv2(HPSv2):
    """HPSv2's architecture with random weights: the cost of a score, and no judgement.

    Args:
        device: on which the weights are drawn.
        toy: a small network on small images.
    """

    def __init__(self, device: str, toy: bool) -> None:
        Scorer.__init__(self)
        config = clip_config(toy)
        with torch.device("meta"):
            shapes = CLIPModel(config).state_dict()
        weights = {name: _draw(name, value, device) for name, value in shapes.items()}
        self.model = build(CLIPModel, config, weights, "random weights")
        self.tokenizer = _tokenizer()


def clip_config(toy: bool = False) -> CLIPConfig:
    """Config of a ViT-H/14, but for the tokens, which are the bundled tokenizer's."""
    tokens = {"bos_token_id": _tokenizer().bos_token_id, "eos_token_id": _tokenizer().eos_token_id}
    text = {**(TOY if toy else TEXT), **tokens, "vocab_size": 49408, "max_position_embeddings": TOKENS}
    vision = {**(TOY if toy else VISION), **PIXELS, **({"image_size": 28} if toy else {})}
    common: dict[str, Any] = {"hidden_act": "gelu", "projection_dim": 64 if toy else WIDTH}
    return CLIPConfig(text_config=text | common, vision_config=vision | common, projection_dim=common["projection_dim"])


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=TOKENS)


def _draw(name: str, shape: torch.Tensor, device: str) -> torch.Tensor:
    """Draw a weight on a device; those of norms are near 1."""
    drawn = torch.randn(shape.shape, device=device) * 0.02
    return (drawn + (1.0 if "norm" in name and name.endswith("weight") else 0.0)).cpu()


def score(site: Site) -> Facts:
    """Score a shard's pairs as `lit-align score` does, in its precision, and run the model alone in equal batches.

    The model alone has its pixels and tokens on the device, and computes both embeddings of each image and prompt.
    """
    presets, folder, shard = site.work / "scorers.yaml", site.work / "scores", site.pairs("sdxl")
    entry = {"class_path": f"{__name__}.RandomHPSv2", "init_args": {"device": site.device, "toy": site.toy}}
    presets.write_text(yaml.safe_dump({NAME: entry}))
    folder.mkdir(exist_ok=True)
    scorer = load_scorers([NAME], presets)[NAME].prepare(site.device)
    assert isinstance(scorer, RandomHPSv2)
    images = 2 * min(BATCH, site.count)
    alone = images * _batches_per_second(scorer, images, site)
    start = now(site.device)
    loaded, todo = {NAME: LoadedScorer(scorer, Identity(1, NAME))}, [ShardToScore(shard, site.count, [NAME])]
    score_shards(todo, loaded, str(folder), BATCH, ReadOptions(), hidden=True)
    rate = 2 * site.count / (now(site.device) - start)
    facts = {"precision": str(scorer.dtype).removeprefix("torch."), "images/s": rate}
    return facts | {"model alone, images/s": alone, "of the model alone": rate / alone}


@torch.no_grad()
def _batches_per_second(scorer: RandomHPSv2, images: int, site: Site) -> float:
    side = scorer.model.config.vision_config.image_size
    pixels = torch.randn(images, 3, side, side, device=site.device, dtype=scorer.dtype)
    prompts = [f"a red fox number {number:05d}, in the snow" for number in range(images)]
    tokens = scorer.tokenizer(prompts, padding=True, return_tensors="pt").input_ids.to(site.device)

    def run() -> None:
        scorer.model.get_image_features(pixels)
        scorer.model.get_text_features(tokens)

    return calls_per_second(run, site.device, 0.1 if site.toy else 2.0)
