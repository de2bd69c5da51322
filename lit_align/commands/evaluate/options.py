"""Options that `lit-align test` and `lit-align predict` have in common."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_align.backbones.base import Precision
from lit_align.backbones.sampling import Sampler
from lit_align.commands.shared.models import (
    Sampling,
    check_numbers,
    default_guidance_scale,
    default_precision,
    native_size,
)


@dataclass(kw_only=True)
class DrawingOptions:
    """Which prompts to draw, how and where.

    Args:
        prompts: file of prompts: `.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`, or text with one prompt per line; or
            one of the sets `emoji` and `general`, which come with lit-align. Repeated prompts are left out.
        output: folder for the results.
        base: pipeline that models were trained from, a hub id or local folder; none: the one that checkpoints name.
        seed: of the noise, together with the prompt.
        sampler: `euler`, `ddim` or `dpm++` (second order, 2M), each with the schedule of the model's pipeline.
        steps: of the sampler, per image.
        guidance_scale: of classifier-free guidance, 1 turns it off; none: 5 for SDXL, 7.5 for Stable Diffusion.
        height: pixels; none: the models' native size.
        width: pixels; none: the models' native size.
        precision: of the UNets; none: fp16 on a GPU, fp32 on the CPU. The VAE computes in fp32.
        batch_size: images at a time on a GPU, where rounding depends on it. On the CPU images are drawn one by one, so
            that results are equal to the last bit for any batch size and number of processes.
        prompt_column: name of the prompts in tables and objects; none: `prompt`, or the name in known benchmarks.
        vae_repo: hub id or local folder of another VAE.
        variant: of the pipelines' weight files, such as `fp16`.
        accelerator: `auto`, `cpu` or `gpu`. The CPU uses OMP_NUM_THREADS threads, or one; the last digits of results
            depend on their number.
        devices: number of devices on this machine, or `auto` for all. torchrun and SLURM override it.
    """

    prompts: str
    output: Path
    base: str | None = None
    seed: int = 0
    sampler: Sampler = "euler"
    steps: int = 50
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    precision: Precision | None = None
    batch_size: int = 4
    prompt_column: str | None = None
    vae_repo: str | None = None
    variant: str | None = None
    accelerator: str = "auto"
    devices: int | str = "auto"

    def check_numbers(self, **counts: int) -> None:
        """Raise a ValueError that names an option with an impossible number.

        Args:
            counts: further options that must be at least 1.
        """
        check_numbers(
            counts | {"steps": self.steps, "batch_size": self.batch_size}, {"height": self.height, "width": self.width}
        )

    def sampling(self, repos: Iterable[str], device: torch.device) -> Sampling:
        """Settings of the images, with defaults for a device filled in.

        Args:
            repos: pipelines of all models; they must agree on a size unless height and width are given.
            device: that draws.
        """
        height, width = self.height, self.width
        if height is None or width is None:
            native = native_size(repos, self.vae_repo)
            height, width = height or native, width or native
        return Sampling(height, width, self.steps, self.precision or default_precision(device), self.sampler)

    def guidance_for(self, repo: str) -> float:
        """Guidance scale, by default the one of a pipeline's own call."""
        return default_guidance_scale(repo) if self.guidance_scale is None else self.guidance_scale
