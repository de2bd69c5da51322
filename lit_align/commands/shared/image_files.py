"""Draw images of prompts into files that are still missing."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from lit_align.commands.shared.models import Model, Sampling, at_a_time
from lit_align.commands.shared.process_group import ProcessGroup
from lit_align.common.files import write_if_absent
from lit_align.common.pixels import encode_image


class Wanted(NamedTuple):
    """An image to draw."""

    prompt: str
    seed: int  # of its noise
    path: Path


def is_whole(path: Path) -> bool:
    """Whether a PNG exists and its checksums are right."""
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception:  # on damaged files PIL raises errors of almost any kind
        return False
    return True


def draw_images(
    model: Model,
    images: Sequence[Wanted],
    guidance_scale: float,
    how: Sampling,
    batch_size: int,
    drawn: Callable[[int], object],
) -> int:
    """Draw images, write each batch as soon as it is drawn, and return how many images have one colour.

    Args:
        model: on its device.
        images: the missing ones.
        guidance_scale: of classifier-free guidance.
        how: size, steps and precision.
        batch_size: images per batch, see `at_a_time`.
        drawn: called with the number of images of each batch.
    """
    count, plain = at_a_time(batch_size, model.denoiser.device), 0
    with ThreadPoolExecutor() as pool:  # PIL encodes without the interpreter's lock
        for start in range(0, len(images), count):
            batch = images[start : start + count]
            prompts, seeds = [one.prompt for one in batch], [one.seed for one in batch]
            pixels = model.draw(prompts, seeds, guidance_scale, how)
            list(pool.map(_write, [one.path for one in batch], pixels))
            plain += int((pixels.amax((2, 3)) == pixels.amin((2, 3))).all(1).sum())
            drawn(len(batch))
    return plain


def note_plain(group: ProcessGroup, name: str, plain: int) -> None:
    """Print how many images of a model have one colour, if any: an over-optimised model may draw such."""
    if plain:
        print(f"{group}: {name} drew {plain} images of one colour alone; their numbers are finite, and they count")


def _write(path: Path, image: Tensor) -> None:
    """Write an image, unless another run has written it: that run may have scored its image already."""
    if is_whole(path):
        return
    path.unlink(missing_ok=True)
    write_if_absent(path, encode_image(image))
