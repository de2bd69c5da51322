"""Measure pairs per second and core, from the two encoded images of a pair to the pixels of a batch.

    python benchmarks/data.py
    python benchmarks/data.py --pairs 8 --rounds 3

Photograph-like JPEG files, equal in every run, are made in a temporary folder. One process with one thread prepares
them in turns as the released code of MaPO does and as lit-align does. Time is CPU time, which other programs disturb
little. Nothing is read from the disk meanwhile.
"""

import argparse
import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lit_align.data import decoder as decoding
from lit_align.data.decoder import decode
from lit_align.data.images import PairTransform
from lit_align.data.shards.layout import parse_sample, read_samples

EMOJI = Path(__file__).parent.parent / "assets/emoji/pairs/high_contrast-over-color/train/00000.tar"
SOURCES = ((1024, 1024), (1280, 960), (1536, 1536))  # width, height
Encoded = tuple[bytes, bytes]
Prepare = Callable[[Encoded, random.Random], Any]


class Released(NamedTuple):
    """A pair as the released code prepares it."""

    pixels: Tensor  # (6, resolution, resolution) float32 in [-1, 1], both images on the channel dimension
    original: tuple[int, int]  # height, width of image 0
    corner: tuple[int, int]  # top, left of the crop


def released_way(encoded: Encoded, draw: random.Random, resolution: int) -> Released:
    """Prepare a pair by the steps of the released code of MaPO (github.com/mapo-t2i/mapo, 374b3d3), in its order."""
    first, second = (Image.open(io.BytesIO(data)).convert("RGB") for data in encoded)
    if second.size != first.size:
        second = second.resize(first.size)
    both = torch.cat([_unit_floats(first), _unit_floats(second)])
    width, height = Image.open(io.BytesIO(encoded[0])).convert("RGB").size  # decoded again for its size
    short = min(both.shape[-2:])
    if short != resolution:
        sides = [max(resolution, int(resolution * side / short)) for side in both.shape[-2:]]
        [both] = torch.nn.functional.interpolate(both[None], sides, mode="bilinear", antialias=True)
    if draw.random() < 0.5:
        both = both.flip(-1)
    top, left = (round((side - resolution) / 2) for side in both.shape[-2:])
    both = both[:, top : top + resolution, left : left + resolution]
    return Released((both - 0.5) / 0.5, (height, width), (top, left))


def _unit_floats(image: Image.Image) -> Tensor:
    """Convert to (3, height, width) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


def photograph(image: Image.Image, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Draw an emoji on texture with grain; its JPEG file is about as large as a photograph's."""
    scene = 0.55 * _texture(width, height, 256, rng) + 0.3 * _texture(width, height, 64, rng)
    scene += 0.15 * _texture(width, height, 16, rng)
    side = round(0.7 * min(width, height))
    top, left = (height - side) // 2, (width - side) // 2
    front = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    scene[top : top + side, left : left + side] *= 0.25
    scene[top : top + side, left : left + side] += 0.75 * front
    scene += 0.35 * (_texture(width, height, 6, rng) - 128) * _texture(width, height, 200, rng) / 255
    scene += rng.normal(0, 1.5, scene.shape)
    return Image.fromarray(scene.clip(0, 255).astype(np.uint8))


def _texture(width: int, height: int, cell: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw smooth noise (height, width, 3) in [0, 255], with spots of `cell` pixels."""
    few = rng.integers(0, 256, (max(2, height // cell), max(2, width // cell), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)


def make_pairs(folder: Path, count: int, width: int, height: int) -> list[Encoded]:
    """Make pairs of JPEG files of quality 90 to 95, equal bytes in every run, and read them back."""
    emoji = [parse_sample(sample) for sample in read_samples(str(EMOJI))]
    pairs = []
    for number in tqdm(range(count), desc=f"making {width} x {height}", unit="pair", leave=False):
        source, files = emoji[number % len(emoji)], []
        for side, data in enumerate((source.image_0, source.image_1)):
            rng = np.random.default_rng([number, side])
            file = folder / f"{width}x{height}-{number}-{side}.jpg"
            picture = photograph(Image.open(io.BytesIO(data)).convert("RGB"), width, height, rng)
            picture.save(file, quality=90 + number % 6)
            files.append(file.read_bytes())
        pairs.append((files[0], files[1]))
    return pairs


def measure(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Measure CPU seconds of each round by way. The ways take turns, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in tqdm(range(rounds + 1), desc="measuring", unit="round", leave=False):
        for name, work in ways.items():
            begin = time.process_time()
            work()
            if number:
                seconds[name].append(time.process_time() - begin)
    return seconds


def compare_ways(pairs: Sequence[Encoded], resolution: int, rounds: int) -> dict[str, list[float]]:
    """Measure CPU seconds per pair by way, one number per round."""
    transform = PairTransform()

    def prepare_all(prepare: Prepare) -> None:
        draw = random.Random(0)
        for pair in pairs:
            prepare(pair, draw)

    def ours(decoder: Any) -> Prepare:
        def prepare(pair: Encoded, draw: random.Random) -> Any:
            decoding.simplejpeg = decoder
            return transform(pair, draw, (resolution, resolution))

        return prepare

    ways: dict[str, Prepare] = {
        "released": lambda pair, draw: released_way(pair, draw, resolution),
        "lit-align": ours(None),
    }
    if decoding.simplejpeg is not None:
        ways["lit-align[fast]"] = ours(decoding.simplejpeg)
    work = {name: (lambda prepare=prepare: prepare_all(prepare)) for name, prepare in ways.items()}
    installed = decoding.simplejpeg
    try:
        return {name: [s / len(pairs) for s in seconds] for name, seconds in measure(work, rounds).items()}
    finally:
        decoding.simplejpeg = installed


def decoders() -> dict[str, Callable[[bytes], NDArray[np.uint8]]]:
    """Installed decoders from a JPEG file to (height, width, 3) uint8."""

    def with_draft(data: bytes) -> NDArray[np.uint8]:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (image.width * 2 // 3, image.height * 2 // 3))  # 1536 to 1024: above a half it does nothing
        return np.asarray(image)

    found = {"Pillow": lambda data: np.asarray(decode(data)), "Pillow, draft to 2/3": with_draft}
    if decoding.simplejpeg is not None:
        found["simplejpeg"] = decoding.simplejpeg.decode_jpeg
    try:
        from turbojpeg import TJPF_RGB, TurboJPEG

        turbo = TurboJPEG()
        found["PyTurboJPEG"] = lambda data: turbo.decode(data, pixel_format=TJPF_RGB)
    except (ImportError, RuntimeError):  # its shared library may be missing
        pass
    return found


def compare_decoders(pairs: Sequence[Encoded], rounds: int) -> list[tuple[str, float, int]]:
    """Compare decoders: name, median CPU seconds per image, largest difference from the first one's pixels."""
    files = [data for pair in pairs for data in pair]
    known = decoders()
    reference, *_ = known.values()

    def decode_all(decoder: Callable[[bytes], NDArray[np.uint8]]) -> None:
        for data in files:
            decoder(data)

    seconds = measure({name: (lambda way=way: decode_all(way)) for name, way in known.items()}, rounds)
    rows = []
    for name, decoder in known.items():
        differences = [np.abs(decoder(data).astype(np.int16) - reference(data)).max() for data in files]
        rows.append((name, statistics.median(seconds[name]) / len(files), int(max(differences))))
    return rows


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24, help="pairs of files of each size (default: 24)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts (default: 5)")
    parser.add_argument("--resolution", type=int, default=1024, help="side of the result, pixels (default: 1024)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lit-align-") as folder:
        print(f"to {arguments.resolution} x {arguments.resolution}, {arguments.pairs} pairs, one thread, CPU time\n")
        print("| JPEG files | kB a file | way | pairs/s | ms a pair | least to greatest ms | times as fast |")
        print("|---" * 7 + "|")
        for width, height in SOURCES:
            pairs = make_pairs(Path(folder), arguments.pairs, width, height)
            kilobytes = statistics.mean(len(data) for pair in pairs for data in pair) / 1000
            seconds = compare_ways(pairs, arguments.resolution, arguments.rounds)
            base = statistics.median(seconds["released"])
            for name, values in seconds.items():
                median, spread = statistics.median(values), f"{1e3 * min(values):.1f} to {1e3 * max(values):.1f}"
                cells = [f"{width} x {height}", f"{kilobytes:.0f}", name, f"{1 / median:.1f}", f"{1e3 * median:.1f}"]
                print("| " + " | ".join([*cells, spread, f"{base / median:.2f}"]) + " |")
        print("\n| decoder, of the last files | ms an image | largest difference of a pixel |\n|---|---|---|")
        for name, median, difference in compare_decoders(pairs, arguments.rounds):
            print(f"| {name} | {1e3 * median:.1f} | {difference} |")


if __name__ == "__main__":
    main()
