"""Write pipeline folders of the published sizes, with random weights, to measure full-size training without downloads.

python benchmarks/full_size.py OUTPUT [--kinds sdxl sd15 sd21] [--device cuda] [--toy]

The configs are those of stabilityai/stable-diffusion-xl-base-1.0, stable-diffusion-v1-5 and stable-diffusion-2-1, but
for the vocabulary: the tokenizers are the bundled ones, whose tokens the larger embedding tables hold. `--toy` keeps
each network's layout and makes it small, to rehearse a benchmark.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENIZER = Path(__file__).parents[1] / "assets/emoji/pipeline/tokenizer"
TOKENS = 77  # of a prompt
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
SD_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_L |= {"projection_dim": 768, "hidden_act": "quick_gelu"}
OPENCLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
OPENCLIP_G |= {"projection_dim": 1280, "hidden_act": "gelu"}
OPENCLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
OPENCLIP_H |= {"projection_dim": 512, "hidden_act": "gelu"}


class Kind(NamedTuple):
    """A published pipeline."""

    pipeline: str  # class of diffusers
    unet: dict[str, Any]
    encoders: tuple[dict[str, Any], ...]
    scaling_factor: float  # of the VAE's latents
    prediction: str  # target of the scheduler
    parameters: int  # of the UNet


KINDS = {
    "sdxl": Kind(
        "StableDiffusionXLPipeline", SDXL_UNET, (CLIP_L, OPENCLIP_G), 0.13025, "epsilon", parameters=2_567_463_684
    ),
    "sd15": Kind(
        "StableDiffusionPipeline",
        {**SD_UNET, "sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
        (CLIP_L,),
        0.18215,
        "epsilon",
        parameters=859_520_964,
    ),
    "sd21": Kind(
        "StableDiffusionPipeline",
        {
            **SD_UNET,
            "sample_size": 96,
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        (OPENCLIP_H,),
        0.18215,
        "v_prediction",
        parameters=865_910_724,
    ),
}


def write_pipeline(
    folder: Path,
    name: str,
    device: str = "cpu",
    toy: bool = False,
    unet: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
) -> int:
    """Write a pipeline folder in bfloat16, and return the number of the UNet's parameters.

    Args:
        folder: made here; it must not exist.
        name: a key of `KINDS`.
        device: on which the random weights are drawn.
        toy: a twentieth of the UNet's channels, and two of each encoder's layers.
        unet: settings in place of those of the UNet's config.
        layers: of each text encoder, in place of the config's.
    """
    kind = KINDS[name]
    texts = kind.encoders
    if layers is not None:
        texts = tuple({**config, "num_hidden_layers": count} for config, count in zip(texts, layers, strict=True))
    kind = kind._replace(unet={**kind.unet, **(unet or {})}, encoders=texts)
    unet_config, encoder_configs = _toy(kind) if toy else (kind.unet, kind.encoders)
    channels = (16, 32, 32, 32) if toy else (128, 256, 512, 512)
    make_vae = _maker(
        AutoencoderKL,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8 if toy else 32,
        latent_channels=4,
        sample_size=1024 if name == "sdxl" else 512,
        scaling_factor=kind.scaling_factor,
        force_upcast=name == "sdxl",
    )
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    denoiser = random_weights(_maker(UNet2DConditionModel, **unet_config), device)
    denoiser.save_pretrained(part / "unet", max_shard_size="20GB")
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    del denoiser
    random_weights(make_vae, device).save_pretrained(part / "vae")
    for number, config in enumerate(encoder_configs):
        _write_encoder(part, "" if number == 0 else f"_{number + 1}", config, device)
    scheduler = EulerDiscreteScheduler if name == "sdxl" else DDIMScheduler
    scheduler(**BETAS, prediction_type=kind.prediction).save_pretrained(part / "scheduler")
    (part / "model_index.json").write_text(json.dumps(_index(kind, scheduler.__name__), indent=2))
    part.rename(folder)
    return count


def _toy(kind: Kind) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    """Shrink the networks, and keep the widths that must fit to each other."""
    encoders = tuple(
        {**config, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"projection_dim": 64}
        for config in kind.encoders
    )
    widths = tuple(channels // 20 for channels in kind.unet["block_out_channels"])
    unet = {**kind.unet, "block_out_channels": widths, "norm_num_groups": 8, "attention_head_dim": 4}
    unet["cross_attention_dim"] = 64 * len(encoders)
    if "transformer_layers_per_block" in unet:
        unet |= {"transformer_layers_per_block": 1, "projection_class_embeddings_input_dim": 64 + 6 * 256}
    return unet, encoders


def _maker(network: type, **config: Any) -> Callable[[], Any]:
    return lambda: network(**config)


def random_weights(make: Callable[[], Any], device: str) -> Any:
    """Make a network without memory, then draw each layer's default weights in bfloat16, on the CPU at the end.

    The weights of convolutions and linear layers are uniform, with the variance that torch gives them.
    """
    with torch.device("meta"):
        network = make()
    network = network.to(torch.bfloat16).to_empty(device=device)
    with torch.no_grad():
        for module in network.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear | nn.Conv2d):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for parameter in module.parameters(recurse=False):
                    parameter.uniform_(-bound, bound)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=0.02)
            elif weight is not None:  # a norm
                nn.init.ones_(weight)
                nn.init.zeros_(module.bias)
    return network.to("cpu")


def _write_encoder(folder: Path, suffix: str, config: dict[str, Any], device: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=TOKENS)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    full = CLIPTextConfig(**config, **special, vocab_size=49408, max_position_embeddings=TOKENS)
    network = CLIPTextModelWithProjection if suffix else CLIPTextModel
    random_weights(lambda: network(full), device).save_pretrained(folder / f"text_encoder{suffix}")
    tokenizer.save_pretrained(folder / f"tokenizer{suffix}")


def _index(kind: Kind, scheduler: str) -> dict[str, Any]:
    """The list of a pipeline's parts, as diffusers reads it."""
    networks = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": scheduler}
    index: dict[str, Any] = {"_class_name": kind.pipeline, **{name: ["diffusers", n] for name, n in networks.items()}}
    for number in range(len(kind.encoders)):
        suffix = "" if number == 0 else f"_{number + 1}"
        encoder = "CLIPTextModelWithProjection" if suffix else "CLIPTextModel"
        index |= {f"text_encoder{suffix}": ["transformers", encoder]}
        index |= {f"tokenizer{suffix}": ["transformers", "CLIPTokenizer"]}
    unused = ("image_encoder", "feature_extractor") + (
        () if kind.pipeline.endswith("XLPipeline") else ("safety_checker",)
    )
    return index | {name: [None, None] for name in unused}


def main() -> None:
    """Write the pipelines, and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for one folder a kind; sdxl takes 7 GB")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--device", default="cpu", help="on which the weights are drawn")
    parser.add_argument("--toy", action="store_true", help="small networks of the same layout")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.kinds:
        start, folder = time.perf_counter(), arguments.output / name
        count = write_pipeline(folder, name, arguments.device, arguments.toy)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        seconds = time.perf_counter() - start
        print(f"{folder}: {count:,} parameters in the UNet, {size / 1e9:.2f} GB, written in {seconds:.0f} s")


if __name__ == "__main__":
    main()
