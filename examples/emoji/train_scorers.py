"""Train the two small scorers of `assets/emoji/scorers` in the formats of published ones.

    python examples/emoji/train_scorers.py --packages . --pairs assets/emoji/pairs --pipeline assets/emoji/pipeline \\
        --output assets/emoji/scorers

`--packages` holds the npm tarballs that `render.py` names. `clip` is a CLIP that learns names of 1,594 emoji in three
styles, colour, high contrast and flat alike; `style` has the layout of the published aesthetic predictor and gives the
log-odds of colour against high contrast. Both learn from clean renderings, from their reconstructions by the
pipeline's VAE and from images redrawn by the pipeline, since that is what they will judge. Redrawn images of held-out
emoji are kept for the measurement. Takes about 15 minutes on two CPU cores; a killed run goes on at its last
checkpoint in `--work`.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLImg2ImgPipeline
from diffusers.utils import logging as diffusers_logging
from pretrain import cosine, pair_images, to_tensor, train_steps
from render import HELD_OUT, STYLES, load_icons, render
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from lit_align.backbones import StableDiffusionXL
from lit_align.backbones.sampling import generate

SEED = 0
BATCH = 128
KINDS = ("color", "high_contrast", "flat")  # the style predictor tells the first from the second
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7)
STEPS, GUIDANCE = 25, 3.0  # as in configs/test/emoji.yaml
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI CLIP's
VISION = {"image_size": 32, "patch_size": 4, "num_attention_heads": 4, "projection_dim": 64, "hidden_act": "gelu"}


# Named as in the published predictor, because its config.json records the name.
class AestheticsPredictorV2Linear(CLIPVisionModelWithProjection):
    """Linear layers without activations on the normalised embedding; gives (batch,) log-odds."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.layers = nn.Sequential(nn.Linear(config.projection_dim, 32), nn.Dropout(0.1), nn.Linear(32, 1))
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        embeddings = super().forward(pixel_values=pixel_values).image_embeds
        return self.layers(F.normalize(embeddings.float(), dim=-1)).squeeze(-1)


def normalise(images: Tensor) -> Tensor:
    """CLIP's input of images in [-1, 1]."""
    return ((images + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    parts = [vae.decode(vae.encode(batch).latent_dist.mode()).sample for batch in images.split(64)]
    return torch.cat(parts).clamp(-1, 1)


@torch.no_grad()
def redraw(backbone: StableDiffusionXL, prompts: list[str], images: Tensor) -> Tensor:
    """The base's own versions (n, 3, 32, 32), strengths in turn, of images in [-1, 1]: what is drawn stays known."""
    pipeline = StableDiffusionXLImg2ImgPipeline(**backbone.pipeline().components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    redrawn = torch.empty_like(images)
    for i, strength in enumerate(STRENGTHS):
        print(f"redrawing {i + 1}/{len(STRENGTHS)}", flush=True)
        latents = pipeline(
            prompts[i :: len(STRENGTHS)],
            image=(images[i :: len(STRENGTHS)] + 1) / 2,
            strength=strength,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(SEED + i),
            output_type="latent",
        ).images
        redrawn[i :: len(STRENGTHS)] = backbone.decode_latents(latents).float() / 127.5 - 1
    return redrawn


def make_images(packages: Path, captions: list[str], backbone: StableDiffusionXL, cache: Path) -> dict:
    """Names (1594), the captions' first; `real` and `restored` (1594, 3 styles, 3, 32, 32); `redrawn` (280, 2, ...)."""
    if cache.exists():
        return torch.load(cache, weights_only=True)
    icons = {style: load_icons(packages, STYLES[style]) for style in KINDS}
    known = [caption.replace(" ", "-") for caption in captions]
    names = known + sorted(set.intersection(*(set(by_name) for by_name in icons.values())) - set(known))
    real = torch.stack([torch.stack([to_tensor(render(icons[style][name])) for style in KINDS]) for name in names])
    print(f"{len(names)} emoji rendered in {len(KINDS)} styles", flush=True)
    restored = reconstruct(backbone.vae, real.flatten(0, 1)).view_as(real)
    twice = [caption for caption in captions for _ in range(2)]
    redrawn = redraw(backbone, twice, real[: len(captions), :2].flatten(0, 1)).unflatten(0, (-1, 2))
    images = {"names": [name.replace("-", " ") for name in names], "real": real}
    images |= {"restored": restored, "redrawn": redrawn}
    torch.save(images, cache)
    return images


def augment(images: Tensor, strength: float) -> Tensor:
    """Small shifts and zooms on white, blur and noise, each of a random size per image, often near none."""
    n = len(images)
    matrices = torch.zeros(n, 2, 3)
    often = (torch.rand(n) < 0.7).float()  # the others stay on their pixels: resampling blurs
    matrices[:, 0, 0] = matrices[:, 1, 1] = 1 + often * (0.2 * torch.rand(n) - 0.1)
    matrices[:, :, 2] = often[:, None] * (0.3 * torch.rand(n, 2) - 0.15)  # up to 2.4 px
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    images = 1 + F.grid_sample(images - 1, grid, align_corners=False)  # pads with white
    for _ in range(round(strength)):
        blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
        images = images.lerp(blurred, (2 * torch.rand(n, 1, 1, 1) - 1).clamp(min=0))
    deviation = 0.2 * strength * torch.rand(n, 1, 1, 1).square()
    return (images + deviation * torch.randn_like(images)).clamp(-1, 1)


def draw_batch(bank: Tensor, concepts: int, styles: int, strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images, rows of `bank`, styles; half of the batch from the pairs' concepts, no emoji twice: in the contrastive
    loss it would be its own negative."""
    half = BATCH // 2
    rows = torch.cat([torch.randperm(concepts)[:half], concepts + torch.randperm(len(bank) - concepts)[:half]])
    kinds = torch.randint(styles, (BATCH,))
    images = bank[rows, kinds, torch.randint(bank.shape[2], (BATCH,))]
    return normalise(augment(images, strength)), rows, kinds


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train_clip(bank: Tensor, concepts: int, ids: Tensor, tokenizer: CLIPTokenizer, steps: int, work: Path) -> CLIPModel:
    torch.manual_seed(SEED)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "projection_dim": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,  # where the text is pooled
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_act": "gelu",
    }
    vision = VISION | {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).train()
    model.set_attn_implementation("eager")  # twice as fast as sdpa's backward pass on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    state = {"model": model, "optimizer": optimizer, "loss": math.nan}
    for step in train_steps("CLIP", steps, state, work / "clip.pt"):
        optimizer.param_groups[0]["lr"] = 1e-3 * cosine(step, steps, warmup=100)
        images, rows, _ = draw_batch(bank, concepts, len(KINDS), strength=1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(pixel_values=images, input_ids=ids[rows], return_loss=True).loss
        state["loss"] = learn(model, optimizer, loss)
        model.logit_scale.data.clamp_(max=math.log(100))  # as CLIP does
    return model.eval()


def train_style(bank: Tensor, concepts: int, steps: int, work: Path) -> AestheticsPredictorV2Linear:
    torch.manual_seed(SEED)
    config = CLIPVisionConfig(**VISION, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    model = AestheticsPredictorV2Linear(config).train()
    model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    state = {"model": model, "optimizer": optimizer, "loss": math.nan}
    for step in train_steps("style", steps, state, work / "style.pt"):
        optimizer.param_groups[0]["lr"] = 1e-3 * cosine(step, steps, warmup=50)
        images, _, kinds = draw_batch(bank, concepts, 2, strength=2)
        with torch.autocast("cpu", torch.bfloat16):
            log_odds = model(images)
        smooth = 0.99 - 0.98 * kinds.float()  # keeps the log-odds finite: 4.6 at best
        loss = F.binary_cross_entropy_with_logits(log_odds.float(), smooth)
        state["loss"] = learn(model, optimizer, loss)
    return model.eval()


@torch.no_grad()
def measure(output: Path, images: dict, captions: list[str], backbone: StableDiffusionXL) -> None:
    """Print what the stored scorers say of the concepts' images, and of the base's own."""
    clip = CLIPModel.from_pretrained(output / "clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(output / "clip")
    style = AestheticsPredictorV2Linear.from_pretrained(output / "style", dtype=torch.float32).eval()
    texts = F.normalize(clip.get_text_features(**tokenizer(captions, padding=True, return_tensors="pt")).pooler_output)
    n = len(captions)
    sets = {f"{part} {kind}": images[part][:n, i] for part in ("real", "restored") for i, kind in enumerate(KINDS)}
    sets |= {f"redrawn {kind}": images["redrawn"][:HELD_OUT, i] for i, kind in enumerate(KINDS[:2])}
    drawn = generate(backbone, captions[:HELD_OUT], list(range(HELD_OUT)), 32, 32, STEPS, GUIDANCE)
    sets["generated"] = drawn.float() / 127.5 - 1
    own = {}
    print("mean and deviation:            top-1   cosine, own name   cosine, others   log-odds of colour")
    for name, pictures in sets.items():
        pixels = normalise(pictures)
        cosines = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output) @ texts.T
        own[name], odds = cosines.diagonal(), style(pixels)
        others = cosines[~torch.eye(*cosines.shape, dtype=torch.bool)]
        top = (cosines.argmax(1) == torch.arange(len(cosines))).float().mean()
        scores = "   ".join(f"{x.mean():6.3f} {x.std():6.3f}" for x in (own[name], others, odds))
        print(f"  {name:24} n={len(pictures):4} {top:6.1%}   {scores}   colour {(odds > 0).float().mean():.1%}")
    for part, rows in {"train": slice(HELD_OUT, n), "held_out": slice(HELD_OUT)}.items():
        colour, high_contrast = own["real color"][rows], own["real high_contrast"][rows]
        print(f"CLIP prefers colour on {(colour > high_contrast).float().mean():.1%} of {len(colour)} {part} pairs")
    known = {"real, all 1,594": images["real"][:, :2], "restored, all 1,594": images["restored"][:, :2]}
    known |= {"redrawn, held out": images["redrawn"][:HELD_OUT], "redrawn, trained on": images["redrawn"][HELD_OUT:]}
    for name, pictures in known.items():
        odds = torch.cat([style(normalise(x)) for x in pictures.flatten(0, 1).split(256)]).view(-1, 2)
        right = ((odds > 0) == torch.tensor([True, False])).float().mean()
        print(f"style accuracy, {name}: {right:.2%} of {odds.numel()}, from {odds.min():.2f} to {odds.max():.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the npm tarballs")
    parser.add_argument("--pairs", type=Path, required=True, help="folder that render.py wrote")
    parser.add_argument("--pipeline", type=Path, required=True, help="folder that pretrain.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for both scorers")
    parser.add_argument("--work", type=Path, default=Path("runs/scorers"), help="folder for images and checkpoints")
    parser.add_argument("--steps", type=int, default=2200, help="of the CLIP; a quarter as many for the style")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    diffusers_logging.set_verbosity_error()

    captions, _ = pair_images(arguments.pairs)  # held out first
    backbone = StableDiffusionXL(str(arguments.pipeline))
    images = make_images(arguments.packages, captions, backbone, arguments.work / "images.pt")
    redrawn = images["restored"].clone()  # also stands where nothing was redrawn
    redrawn[HELD_OUT : len(captions), :2] = images["redrawn"][HELD_OUT:]
    bank = torch.stack([images["real"], images["restored"], redrawn], dim=2)  # (1594, 3, 3, 3, 32, 32)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.pipeline / "tokenizer")
    ids = tokenizer(images["names"], padding=True, return_tensors="pt").input_ids
    clip = train_clip(bank, len(captions), ids, tokenizer, arguments.steps, arguments.work)
    style = train_style(bank, len(captions), arguments.steps // 4, arguments.work)
    clip.half().save_pretrained(arguments.output / "clip")
    tokenizer.save_pretrained(arguments.output / "clip")
    style.half().save_pretrained(arguments.output / "style")
    measure(arguments.output, images, captions, backbone)


if __name__ == "__main__":
    main()
