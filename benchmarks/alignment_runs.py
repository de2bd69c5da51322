"""One training of the comparison of objectives, and measurements of its images."""

import functools
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers.utils import logging as transformers_logging

from lit_align.backbones import StableDiffusionXL
from lit_align.backbones.sampling import generate
from lit_align.callbacks import ReferenceUpdate
from lit_align.common.files import atomic_path, write_text
from lit_align.common.pixels import to_image
from lit_align.data import PreferenceDataModule
from lit_align.evaluation.prompts import prompt_seed
from lit_align.objectives import SFT, Objective
from lit_align.scoring import Scorer, load_scorers
from lit_align.scoring.scorers.analytic import high_contrast
from lit_align.scoring.scorers.preprocessing import centre_crops
from lit_align.scoring.vote import Vote
from lit_align.training.module import AlignmentModule
from lit_align.types import PreferenceBatch

PIPELINE = "assets/emoji/pipeline"
PAIRS = "assets/emoji/pairs"
PRESETS = Path(__file__).with_name("objectives_scorers.yaml")
SIZE, SAMPLING_STEPS, GUIDANCE = 32, 16, 3.0
STEPS, BATCH = 60, 8  # optimizer steps of a training, pairs in each
TUNING_PROMPTS = 52
DRAWS = 2  # noises and timesteps per held-out pair
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Method:
    """An objective, and the vote that orders its pairs."""

    title: str
    objective: Callable[[], Objective]
    vote: Vote | None = None
    update_every: int | None = None  # steps between copies of the policy into the reference


class Run(NamedTuple):
    """One training."""

    study: str
    base: str  # name
    method: str
    rate: float
    seed: int

    def folder(self, output: Path) -> Path:
        return output / self.study / self.base / f"{self.method}-lr{self.rate:g}-seed{self.seed}"


def settle() -> None:
    """Prepare a process for its runs: one thread, no warnings."""
    torch.set_num_threads(1)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()


def load(weights: Path | None) -> StableDiffusionXL:
    """Load the bundled model, with other weights of the UNet if they are given."""
    backbone = StableDiffusionXL(PIPELINE)
    if weights is not None:
        backbone.denoiser.load_state_dict(load_file(weights))
    return backbone


def train(
    method: Method,
    base: Path | None,
    pairs: str,
    rate: float,
    seed: int,
    stored: dict[str, str | None],
    steps: int = STEPS,
) -> tuple[StableDiffusionXL, dict[str, float]]:
    """Align a base; return it with the median `seconds` of a step and the number of `pairs`.

    Args:
        method: objective and vote.
        base: weights of the UNet to start from; none: the bundled ones.
        pairs: folder of `train`.
        rate: constant learning rate of AdamW.
        seed: of weights, data and noise.
        stored: `train_scores` and `train_cache` of the data module.
        steps: optimizer steps.
    """
    L.seed_everything(seed, verbose=False)
    backbone = load(base)
    module = AlignmentModule(backbone, method.objective(), lambda weights: torch.optim.AdamW(weights, lr=rate))
    module.seed = seed
    data = PreferenceDataModule(
        f"{pairs}/train/*.tar",
        resolution=SIZE,
        batch_size=BATCH,
        num_workers=0,
        shuffle_window=256,
        flip_probability=0.0,  # emoji have a side that faces you
        vote=method.vote,
        seed=seed,
        **stored,
    )
    clock = Clock()
    updates = [] if method.update_every is None else [ReferenceUpdate(method.update_every)]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, *updates],
    )
    trainer.fit(module, data)
    pairs_in_all = data.order(data.train, data.shuffle_window, 0, 1).pairs
    return backbone, {"seconds": statistics.median(clock.seconds()), "pairs": pairs_in_all}


class Clock(L.Callback):
    """Measure the seconds of each training step, with the wait for its data."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]


def save(backbone: StableDiffusionXL, folder: Path) -> None:
    """Write the UNet's weights atomically."""
    with atomic_path(folder / WEIGHTS) as part:
        save_file({name: value.contiguous() for name, value in backbone.denoiser.state_dict().items()}, part)


def look(backbone: StableDiffusionXL, prompts: list[str], scorers: tuple[str, ...], picture: Path) -> dict[str, Any]:
    """Draw one image per prompt into a picture, and return measurements, one per prompt."""
    batches = [prompts[first : first + 12] for first in range(0, len(prompts), 12)]
    with backbone.borrowed_encoders():
        images = torch.cat(
            [
                generate(backbone, batch, [prompt_seed(p, 0) for p in batch], SIZE, SIZE, SAMPLING_STEPS, GUIDANCE)
                for batch in batches
            ]
        )
    draw_tiles(images, picture)
    loaded = judges()
    return {
        "scores": {name: loaded[name].score(list(images), prompts).tolist() for name in scorers},
        "in_style": high_contrast(images).tolist(),
        "diversity": diversity(images),
    }


@torch.no_grad()
def diversity(images: Tensor) -> float:
    """Mean of 1 - cosine of the small CLIP's embeddings, over images of different prompts."""
    model = judges()["clip"].model
    pixels = centre_crops(list(images), model.config.vision_config.image_size)
    embedded = normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    cosines = embedded @ embedded.T
    n = len(images)
    return float((n * n - cosines.sum()) / (n * (n - 1)))


@functools.cache
def judges() -> dict[str, Any]:
    """Load all scorers, once per process."""
    names = ("clip", "style", "colour", "sharpness")
    scorers: dict[str, Scorer] = load_scorers(names, PRESETS)
    return {name: scorer.prepare("cpu") for name, scorer in scorers.items()}


def draw_tiles(images: Tensor, path: Path, columns: int = 12) -> None:
    """Draw all images at their size, row after row."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * SIZE, rows * SIZE), "white")
    for number, image in enumerate(images):
        sheet.paste(to_image(image), (number % columns * SIZE, number // columns * SIZE))
    sheet.save(path)


@functools.cache
def held_out(pairs: str) -> list[PreferenceBatch]:
    """Held-out pairs, ordered by the human label."""
    data = PreferenceDataModule("unused", f"{pairs}/held_out/*.tar", resolution=SIZE, batch_size=24, num_workers=0)
    data.setup("validate")
    return list(data.val_dataloader())


def prompts_of(pairs: str, split: str) -> list[str]:
    """Prompts of a split without duplicates; of the training prompts, which only choose learning rates, some."""
    if split == "held_out":
        return list(dict.fromkeys(prompt for batch in held_out(pairs) for prompt in batch.prompts))
    data = PreferenceDataModule("unused", f"{pairs}/train/*.tar", resolution=SIZE, batch_size=500, num_workers=0)
    data.setup("validate")
    prompts = sorted({prompt for batch in data.val_dataloader() for prompt in batch.prompts})
    return prompts[:: len(prompts) // TUNING_PROMPTS][:TUNING_PROMPTS]


@torch.no_grad()
def errors(backbone: StableDiffusionXL, pairs: str) -> dict[str, list[float]]:
    """Errors of chosen and rejected held-out images, on equal draws for every model."""
    module = AlignmentModule(backbone, SFT(), validation_draws=DRAWS)
    backbone.eval()
    found: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for batch in held_out(pairs):
        encoded = backbone.encode(batch)
        for repeat in range(DRAWS):
            policy = backbone.pair_errors(encoded, module.validation_draw(encoded, repeat))
            found["chosen"] += policy.chosen.tolist()
            found["rejected"] += policy.rejected.tolist()
    return found


def write_json(path: Path, values: Any) -> None:
    """Write plain values atomically."""
    write_text(path, json.dumps(values))
