"""Drawing in the middle of training: the ranks share the prompts, and training goes on as if nothing had been."""

from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor

from lit_align.backbones.sampling import generate
from lit_align.callbacks.throughput import Throughput
from lit_align.common.progress import show_progress
from lit_align.training.module import AlignmentModule


class Sampling(NamedTuple):
    """How an image is drawn, in the order of `generate`."""

    height: int  # pixels
    width: int
    steps: int
    guidance_scale: float


def share(trainer: L.Trainer, count: int) -> list[int]:
    """Numbers below `count` of this rank's share: as many on each rank, some twice where they do not come out even."""
    size = -(-count // trainer.world_size)
    return [number % count for number in range(trainer.global_rank * size, (trainer.global_rank + 1) * size)]


def gather(trainer: L.Trainer, module: L.LightningModule, mine: Tensor, count: int) -> Tensor:
    """All ranks' shares (count, ...) on the CPU, on every rank, in the order of their numbers; a collective.

    Args:
        mine: (numbers in `share`, ...)
        count: as given to `share`.
    """
    if trainer.world_size > 1:
        gathered = module.all_gather(mine.to(module.device))
        assert isinstance(gathered, Tensor)
        mine = gathered.flatten(0, 1).cpu()
    return mine[:count]


def draw(
    trainer: L.Trainer, module: L.LightningModule, prompts: list[str], seeds: list[int], sampling: Sampling
) -> Tensor:
    """Images (n, 3, height, width) uint8 on the CPU, in the Trainer's precision.

    Weights, modes and random state are as before afterwards. One image at a time: a training step has left little
    memory for more, and no image depends on those beside it.
    """
    assert isinstance(module, AlignmentModule)
    images = []
    with (
        trainer.precision_plugin.forward_context(),
        module.backbone.borrowed_encoders(),
        show_progress(len(prompts), "drawing", "image", delay=10.0, hidden=not trainer.is_global_zero) as bar,
    ):
        for prompt, seed in zip(prompts, seeds, strict=True):
            images.append(generate(module.backbone, [prompt], [seed], *sampling))
            bar.update()
    return torch.cat(images)


def pause_throughput(trainer: L.Trainer) -> None:
    """Until the next batch: drawing is not training."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set in Trainer's constructor
        if isinstance(callback, Throughput):
            callback.pause()
