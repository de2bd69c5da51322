"""Where the benchmarks' trainings run: pipelines of random weights and pairs of random images, made at first use."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.full_size import write_pipeline
from lit_align.data.shards.writer import NewPair, write_shard


@dataclass(frozen=True)
class Site:
    """Where a benchmark runs, and with what.

    Args:
        work: folder for pipelines, pairs and runs.
        device: `cuda` or `cpu`.
        toy: small networks and images, to rehearse.
        workers: processes of a training's loader.
        side: of all images, pixels; None takes the published pipeline's.
    """

    work: Path
    device: str
    toy: bool
    workers: int
    side: int | None = None

    @property
    def accelerator(self) -> str:
        """The device in the words of the commands."""
        return "gpu" if self.device == "cuda" else "cpu"

    @property
    def steps(self) -> tuple[int, int]:
        """Steps before the clock starts, and timed ones."""
        return (1, 1) if self.toy else (3, 20)

    def resolution(self, kind: str) -> int:
        """Side of the training images in pixels."""
        if self.side is not None:
            return self.side
        return (64 if self.toy else 1024) if kind == "sdxl" else (32 if self.toy else 512)

    def pipeline(self, kind: str) -> Path:
        """Write the pipeline of a kind, at its first use."""
        folder = self.work / kind
        if not folder.exists():
            write_pipeline(folder, kind, self.device, self.toy)
        return folder

    def pairs(self, kind: str) -> str:
        """Write pairs of a kind's resolution, at their first use, and return the name of their shard."""
        side = self.resolution(kind)
        shard = self.work / f"pairs-{side}/00000.tar"
        if not shard.exists():
            shard.parent.mkdir(parents=True, exist_ok=True)
            write_shard(shard, (pair(number, side) for number in range(self.count)))
        return str(shard)

    @property
    def count(self) -> int:
        """Pairs of a shard: enough that no epoch ends within the timed steps of up to 4 pairs."""
        return 8 if self.toy else 96


def pair(number: int, side: int) -> NewPair:
    """A pair of smooth random images, whose files are about as large as photographs'."""
    draw = np.random.default_rng(number)

    def image() -> bytes:
        coarse, buffer = draw.integers(0, 256, (max(side // 8, 2), max(side // 8, 2), 3), dtype=np.uint8), io.BytesIO()
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=92)
        return buffer.getvalue()

    return NewPair(f"{number:05d}", image(), image(), 1.0, f"a red fox number {number}, in the snow")
