"""Options that `lit-align test` and `lit-align predict` have in common."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lit_align.commands.shared.options import DeviceOptions, SamplingOptions
from lit_align.common.choices import Sampler

if TYPE_CHECKING:
    import torch

    from lit_align.commands.shared.models import Sampling


@dataclass(kw_only=True)
class DrawingOptions(SamplingOptions, DeviceOptions):
    """Which prompts to draw, how and where.

    Args:
        prompts: file of prompts: `.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`, or text with one prompt per line; or
            one of the sets `emoji` and `general`, which come with lit-align; or shards of pairs, their folder or their
            index.json. Repeated prompts are left out.
        output: folder for the results.
        base: pipeline that models were trained from, a hub id or local folder; none: the one that checkpoints name.
        seed: of the noise, together with the prompt.
        sampler: `euler`, `ddim` or `dpm++` (second order, 2M), each with the schedule of the model's pipeline.
        batch_size: images at a time on a GPU, where rounding depends on it. On the CPU images are drawn one by one, so
            that results are equal to the last bit for any batch size and number of processes.
        prompt_column: name of the prompts in tables and objects; none: `prompt`, or the name in known benchmarks.
        accelerator: `auto`, `cpu` or `gpu`. The CPU uses OMP_NUM_THREADS threads, or one; the last digits of results
            depend on their number.
    """

    prompts: str
    output: Path
    base: str | None = None
    seed: int = 0
    sampler: Sampler = "euler"
    batch_size: int = 4
    prompt_column: str | None = None

    def sampling(self, repos: Iterable[str], device: "torch.device") -> "Sampling":
        """Settings of the images, with the chosen sampler."""
        return super().sampling(repos, device)._replace(sampler=self.sampler)
