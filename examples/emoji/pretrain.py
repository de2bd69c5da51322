"""Pretrain the small SDXL pipeline of `assets/emoji/pipeline` on two styles of Fluent Emoji.

    python examples/emoji/pretrain.py --packages . --pairs assets/emoji/pairs --output assets/emoji/pipeline

`--packages` holds the npm tarballs that `render.py` names. The VAE learns from every emoji that
has both styles (1,594), colour and high contrast; then the UNet and both text encoders learn,
from nothing, to draw the emoji of the pairs in either style from their name alone, without a
style word: the base has both styles in it, and a preference has something to choose. The flat
style is never seen. Takes about 65 minutes on two CPU cores; a killed run goes on at its last
checkpoint in `--work`.
"""

import argparse
import copy
import io
import json
import math
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from render import STYLES, load_icons, render
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SEED = 0
TOKENS = 32
BATCH = 32
LEARNED_STYLES = ("color", "high_contrast")


def to_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def vae_images(packages: Path) -> Tensor:
    """(2 * 1594, 3, 32, 32): every emoji that has both learned styles, in both."""
    icons = {style: load_icons(packages, STYLES[style]) for style in LEARNED_STYLES}
    names = sorted(set.intersection(*(set(by_name) for by_name in icons.values())))
    return torch.stack([to_tensor(render(icons[style][name])) for style in LEARNED_STYLES for name in names])


def pair_images(pairs: Path) -> tuple[list[str], Tensor]:
    """Captions and (n, 2, 3, 32, 32) images, preferred style second, of all pairs of the learned styles."""
    captions, images = [], []
    for shard in sorted((pairs / "high_contrast-over-color").glob("*/*.tar")):
        with tarfile.open(shard) as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
        for key in [name.removesuffix(".caption.txt") for name in contents if name.endswith(".caption.txt")]:
            chosen = 0 if contents[f"{key}.label_0.txt"] == b"1" else 1
            decoded = [to_tensor(Image.open(io.BytesIO(contents[f"{key}.jpg_{i}.png"]))) for i in (1 - chosen, chosen)]
            captions.append(contents[f"{key}.caption.txt"].decode())
            images.append(torch.stack(decoded))
    return captions, torch.stack(images)


def make_tokenizers(captions: list[str]) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """CLIP's byte-level BPE with merges learned from the captions; pad tokens as in SDXL."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=700, end_of_word_suffix="</w>"))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["!"] + [c for c in alphabet if c != "!"] + [c + "</w>" for c in alphabet]
    tokens += [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    make = lambda pad: CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=TOKENS)  # noqa: E731
    return make("<|endoftext|>"), make("!")


def make_networks(tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection]:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TOKENS,
        "projection_dim": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=128,  # both text encoders side by side
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 64,
        norm_num_groups=16,
    )
    first = CLIPTextModel(CLIPTextConfig(**text, hidden_act="quick_gelu"))
    second = CLIPTextModelWithProjection(CLIPTextConfig(**text, hidden_act="gelu"))
    return unet, first, second


def cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train_steps(name: str, steps: int, state: dict, path: Path) -> Iterator[int]:
    """Step numbers from the last checkpoint on, with progress, time left and a checkpoint every 500 steps."""
    parts = {key: part for key, part in state.items() if hasattr(part, "load_state_dict")}
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        first = saved["step"]
        for key, part in parts.items():
            part.load_state_dict(saved[key])
    start = time.monotonic()
    for step in range(first, steps):
        torch.manual_seed(SEED + step)  # a resumed run draws what the unbroken one would have drawn
        yield step
        if (step + 1) % 100 == 0:
            left = (time.monotonic() - start) / (step + 1 - first) * (steps - step - 1)
            print(f"{name} {step + 1}/{steps}, loss {state['loss']:.4f}, {left / 60:.0f} min left", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            torch.save({"step": step + 1} | {k: p.state_dict() for k, p in parts.items()}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)


def train_vae(images: Tensor, steps: int, work: Path) -> AutoencoderKL:
    """A KL VAE of one down-sampling step: 32 x 32 pixels to 16 x 16 x 4 latents."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        latent_channels=4,
        norm_num_groups=16,
        sample_size=32,
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4)
    state = {"vae": vae, "optimizer": optimizer, "loss": math.nan}
    for step in train_steps("VAE", steps, state, work / "vae.pt"):
        optimizer.param_groups[0]["lr"] = 1e-3 * cosine(step, steps)
        batch = images[torch.randint(len(images), (BATCH,))]
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            restored = vae.decode(posterior.sample()).sample
        mse = F.mse_loss(restored.float(), batch)
        loss = mse + 0.1 * F.l1_loss(restored.float(), batch) + 1e-5 * posterior.kl().float().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        state["loss"] = mse.item()
    return vae.float().to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in images.split(64)])


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold zero mean and unit variance per latent channel into the VAE's own 1 x 1 convolutions.

    The noise schedule does not reach zero signal at its last step, so a latent mean off zero
    leaks into generated images as a tint. The posterior, wide where a picture is plain white, is narrowed to a
    deviation of 0.007, about what large VAEs have: the UNet learns from its modes.
    """
    latents = encode(vae, images)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    scale = torch.cat([1 / std, torch.zeros(4)])  # the encoder's channels: 4 means, then 4 log variances
    shift = torch.cat([-mean / std, torch.full((4,), -10.0)])
    before.weight.mul_(scale[:, None, None, None])
    before.bias.mul_(scale).add_(shift)
    after.bias.add_(after.weight[:, :, 0, 0] @ mean)
    after.weight.mul_(std[None, :, None, None])


def encode_prompts(
    captions: list[str],
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    encoders: tuple[nn.Module, nn.Module],
    dropped: Tensor,
) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning: (batch, tokens, 128) and (batch, 64); zeros where the prompt is dropped, as SDXL does."""
    hidden = []
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        ids = tokenizer(
            captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    keep = (~dropped).float()
    return torch.cat(hidden, -1) * keep[:, None, None], output.text_embeds * keep[:, None]


def train_unet(
    captions: list[str],
    latents: Tensor,
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    scheduler: EulerDiscreteScheduler,
    steps: int,
    work: Path,
) -> nn.ModuleList:
    """UNet and text encoders together, on latents (n, 2, 4, 16, 16) of both styles; returns their running average."""
    torch.manual_seed(SEED)
    networks = nn.ModuleList(make_networks(tokenizers[0])).train()
    average = copy.deepcopy(networks).requires_grad_(False)
    optimizer = torch.optim.AdamW(networks.parameters(), lr=5e-4, weight_decay=1e-2, fused=True)
    state = {"networks": networks, "average": average, "optimizer": optimizer, "loss": 1.0}
    time_ids = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]]).repeat(BATCH, 1)
    for step in train_steps("UNet", steps, state, work / "unet.pt"):
        optimizer.param_groups[0]["lr"] = 5e-4 * cosine(step, steps)
        concepts, styles = torch.randint(len(captions), (BATCH,)), torch.randint(2, (BATCH,))
        clean, noise = latents[concepts, styles], torch.randn(BATCH, *latents.shape[2:])
        times = (((torch.arange(BATCH) + torch.rand(())) / BATCH) * 1000).long()  # stratified, uniform
        signal = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            prompts = [captions[i] for i in concepts]
            hidden, pooled = encode_prompts(prompts, tokenizers, networks[1:], torch.rand(BATCH) < 0.1)
            conditions = {"text_embeds": pooled, "time_ids": time_ids}
            noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
            predicted = networks[0](noisy, times, hidden, added_cond_kwargs=conditions).sample
        loss = F.mse_loss(predicted.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(networks.parameters()), 1 - decay)
        state["loss"] = 0.99 * state["loss"] + 0.01 * loss.item()
    return average.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the npm tarballs")
    parser.add_argument("--pairs", type=Path, required=True, help="folder that render.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="folder for checkpoints")
    parser.add_argument("--vae_steps", type=int, default=3000)
    parser.add_argument("--unet_steps", type=int, default=6500)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)

    captions, images = pair_images(arguments.pairs)
    vae = train_vae(vae_images(arguments.packages), arguments.vae_steps, arguments.work)
    standardise_latents(vae, images.flatten(0, 1))
    latents = encode(vae, images.flatten(0, 1)).unflatten(0, images.shape[:2])

    tokenizers = make_tokenizers(captions)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )  # SDXL's own
    unet, first, second = train_unet(captions, latents, tokenizers, scheduler, arguments.unet_steps, arguments.work)
    pipeline = StableDiffusionXLPipeline(
        vae=vae.half(),  # diffusers loads half precision files as float32
        text_encoder=first,  # transformers does not
        text_encoder_2=second,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet.half(),
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.save_pretrained(arguments.output)
    for folder in ("text_encoder", "text_encoder_2"):
        use_published_names(arguments.output / folder / "model.safetensors")


def use_published_names(path: Path) -> None:
    """Names as in published checkpoints: transformers 5 drops the prefix, without which version 4 loads nothing."""
    weights = load_file(path)
    prefix = "text_model."
    named = {k if k.startswith((prefix, "text_projection")) else prefix + k: v for k, v in weights.items()}
    save_file(named, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
