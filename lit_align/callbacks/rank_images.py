"""Images generated in the middle of training: the ranks share the prompts, and training is not affected."""

from collections.abc import Sequence
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_align.backbones.sampling import generate
from lit_align.callbacks.preemption import end_if_signalled
from lit_align.callbacks.throughput import Throughput
from lit_align.common.progress import show_progress
from lit_align.training.module import AlignmentModule


class Sampling(NamedTuple):
    """Settings of image generation, in the order of the arguments of `generate`."""

    height: int  # pixels
    width: int
    steps: int
    guidance_scale: float


def generate_on_ranks(
    trainer: L.Trainer, module: L.LightningModule, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
) -> tuple[list[int], Tensor]:
    """Generate this rank's share of the images, in the Trainer's precision, without a trace in the run.

    One image at a time: training leaves little memory, and no image may depend on the number of ranks. Before the first
    training step a signal ends the run after the sampling step that it meets; all ranks take equally many.

    Args:
        trainer: of the run.
        module: the `AlignmentModule`; its weights, modes and the random state stay as they are.
        prompts: of all ranks.
        seeds: one for each prompt.
        sampling: of all images.

    Returns:
        The numbers of this rank's prompts, and their images (n, 3, height, width) uint8 on the CPU.
    """
    assert isinstance(module, AlignmentModule)
    images, numbers = [], rank_share(trainer, len(prompts))
    name = f"images of step {trainer.global_step:,}" if trainer.global_step else "images of the base model"
    if trainer.global_step == 0:
        size = f"{sampling.width} x {sampling.height} pixels"
        rank_zero_info(f"{name}: {len(prompts)} of {size}, {sampling.steps} sampling steps each")
    total, hidden = len(numbers) * sampling.steps, not trainer.is_global_zero
    with (
        trainer.precision_plugin.forward_context(),
        module.backbone.borrowed_encoders(),
        show_progress(total, name, "sampling step", delay=10.0, hidden=hidden) as bar,
    ):

        def after_step() -> None:
            bar.update()
            end_if_signalled(trainer)

        for number in numbers:
            prompt, seed = [prompts[number]], [seeds[number]]
            images.append(generate(module.backbone, prompt, seed, *sampling, after_step=after_step))
    return numbers, torch.cat(images)


def rank_share(trainer: L.Trainer, count: int) -> list[int]:
    """Numbers below `count` of this rank. All ranks get equally many: where needed the last ones repeat numbers."""
    size = -(-count // trainer.world_size)
    return [number % count for number in range(trainer.global_rank * size, (trainer.global_rank + 1) * size)]


def gather_shares(trainer: L.Trainer, module: L.LightningModule, share: Tensor, count: int) -> Tensor:
    """Gather the shares of all ranks: (count, ...) in the order of numbers, on each rank's CPU; a collective.

    Args:
        trainer: of the run.
        module: of the run.
        share: (numbers in `rank_share`, ...).
        count: numbers in all.
    """
    if trainer.world_size > 1:
        gathered = module.all_gather(share.to(module.device))
        assert isinstance(gathered, Tensor)
        share = gathered.flatten(0, 1).cpu()
    return share[:count]


def pause_throughput(trainer: L.Trainer) -> None:
    """Pause the clock of `Throughput` until the next batch."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set in Trainer's constructor
        if isinstance(callback, Throughput):
            callback.pause(trainer)
