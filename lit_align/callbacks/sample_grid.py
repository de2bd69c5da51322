"""A picture of the progress: images of fixed prompts by the base model and by the model in training."""

import io
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image, ImageDraw
from torch import Tensor

from lit_align.callbacks.rank_images import Sampling, gather_shares, generate_on_ranks, pause_throughput
from lit_align.common.files import write_png
from lit_align.common.lettering import Lettering, name_unknown
from lit_align.common.pixels import encode_image, from_image, to_image
from lit_align.evaluation.image_statistics import against_base, describe, image_statistics
from lit_align.training.checkpoints.run_folder import run_folder
from lit_align.training.steps import at_every
from lit_align.user_errors import UserValueError


class SampleGrid(L.Callback):
    """Generates images before training, every N steps and at the end, for a PNG file and TensorBoard.

    Each prompt keeps its seed, so that two rows differ only by what was trained. Statistics of the images are logged
    beside their change from the base, see `image_statistics`. The ranks share the prompts. Training is not affected.

    Args:
        prompts: one image each.
        every_n_steps: optimizer steps between grids; 0 makes one only before and after training.
        height: pixels.
        width: pixels.
        steps: Euler steps per image.
        guidance_scale: of classifier-free guidance; 1 turns it off.
        seed: the noise of prompt i is drawn from seed + i.
    """

    def __init__(
        self,
        prompts: list[str],
        every_n_steps: int = 500,
        height: int = 1024,
        width: int = 1024,
        steps: int = 50,
        guidance_scale: float = 5.0,
        seed: int = 0,
    ) -> None:
        if not prompts:
            raise UserValueError("SampleGrid.prompts is empty; name at least one prompt, or leave the callback out.")
        self.prompts, self.every_n_steps, self.seed = list(prompts), every_n_steps, seed
        self.sampling = Sampling(height, width, steps, guidance_scale)
        self.base: list[bytes] = []  # PNGs; in the checkpoint, as a resumed run cannot generate them again
        self.drawn_at = -1  # step of the last grid

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0 and not self.base:
            self.base = [encode_image(image) for image in self._images(trainer, pl_module)]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_every(trainer, self.every_n_steps):
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.drawn_at != trainer.global_step:
            self._draw(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base, "drawn_at": self.drawn_at, "drawing": self._drawing()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.drawn_at = state_dict["drawn_at"]
        if state_dict["drawing"] == self._drawing():
            self.base = state_dict["base"]
        else:
            rank_zero_warn("SampleGrid: prompts or sampling differ from the checkpoint's; grids lack the base.")

    def _drawing(self) -> list[Any]:
        """All settings that determine the base model's images."""
        return [self.prompts, self.seed, *self.sampling]

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.drawn_at = step = trainer.global_step
        pause_throughput(trainer)
        base, images = [from_image(Image.open(io.BytesIO(png))) for png in self.base], self._images(trainer, pl_module)
        folder = run_folder(trainer) / "samples"  # a collective
        if not trainer.is_global_zero:
            return
        self._log_statistics(trainer, images, base)
        grid = draw_grid(self.prompts, ({"base": base} if base else {}) | {f"step {step}": images})
        write_png(folder / f"step-{step:07d}.png", grid)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", from_image(grid), step)

    def _log_statistics(self, trainer: L.Trainer, images: list[Tensor], base: list[Tensor]) -> None:
        """Log `samples/<name>` and `samples/<name>_vs_base`, which show a model that was trained too far."""
        statistics = image_statistics(torch.stack(images))
        change = against_base(statistics, image_statistics(torch.stack(base))) if base else {}
        values = statistics | {f"{name}_vs_base": value for name, value in change.items()}
        for logger in trainer.loggers:
            logger.log_metrics({f"samples/{name}": value for name, value in values.items()}, trainer.global_step)
        rank_zero_info(f"step {trainer.global_step:,}: samples' {describe(statistics, change)}")

    def _images(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[Tensor]:
        """Generate all prompts' images, (3, height, width) uint8 each."""
        seeds = [self.seed + number for number in range(len(self.prompts))]
        _, images = generate_on_ranks(trainer, pl_module, self.prompts, seeds, self.sampling)
        return list(gather_shares(trainer, pl_module, images, len(self.prompts)))


def draw_grid(prompts: list[str], rows: dict[str, list[Tensor]], cell: int = 128) -> Image.Image:
    """Draw one column per prompt and one row per model.

    Args:
        prompts: titles of the columns.
        rows: by the model's name, images (3, height, width) uint8, one for each prompt.
        cell: smaller images are enlarged to about this width, in pixels.
    """
    height, width = next(iter(rows.values()))[0].shape[-2:]
    scale = max(1, cell // width)
    height, width, margin, line = height * scale, width * scale, 90, 16
    grid = Image.new("RGB", (margin + len(prompts) * (width + 4), line + len(rows) * (height + 4)), "white")
    pen, letters = ImageDraw.Draw(grid), Lettering(10, plain=True)
    for column, prompt in enumerate(prompts):
        x = margin + column * (width + 4)
        letters.draw(pen, (x, 2), _fit(letters, prompt, width), "black", anchor="la")
        for row, images in enumerate(rows.values()):
            image = to_image(images[column])
            grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, line + row * (height + 4)))
    for row, name in enumerate(rows):
        pen.text((4, line + row * (height + 4) + height // 2 - 6), name, fill="black")
    if letters.unknown:
        rank_zero_info(name_unknown(letters.unknown))
    return grid


def _fit(letters: Lettering, text: str, width: int) -> str:
    """Cut the text, in characters that a font has, to `width` pixels."""
    text = letters.readable(" ".join(text.split()))
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
