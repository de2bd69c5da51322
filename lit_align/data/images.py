"""From two encoded images to two tensors of one size."""

import io
import random
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

Crop = Literal["center", "random"]
ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")  # of an object in memory, which says nothing to anybody
JPEG = b"\xff\xd8\xff"
ORIENTATION = 0x0112  # in EXIF; 2 to 8 ask for turning
simplejpeg: Any = import_module("simplejpeg") if find_spec("simplejpeg") else None  # the extra `fast`


class PairImages(NamedTuple):
    """Both images of a pair, and SDXL's micro-conditioning of each."""

    images: tuple[Tensor, Tensor]  # (3, height, width) uint8
    time_ids: tuple[Tensor, Tensor]  # (6,) int64: original h, w; crop top, left; target h, w; pixels
    flipped: bool  # both, or neither


@dataclass(frozen=True)
class PairTransform:
    """Resize (bilinear) until the shape is covered, flip and crop, with one draw for both images of a pair.

    Args:
        crop: where: the middle, or a place drawn once per pair, in parts of what is left over.
        flip_probability: chance of a horizontal flip of both images.
    """

    crop: Crop = "center"
    flip_probability: float = 0.5

    def __call__(self, encoded: tuple[bytes, bytes], draw: random.Random, shape: tuple[int, int]) -> PairImages:
        """Decode both images and bring each to `shape`, height and width in pixels, without stretching it.

        Raises:
            ImageError: where an image cannot be decoded.
        """
        flip = draw.random() < self.flip_probability
        down, right = (draw.random(), draw.random()) if self.crop == "random" else (0.5, 0.5)
        first, second = (transform(decode_pixels(data), shape, flip, down, right) for data in encoded)
        return PairImages((first[0], second[0]), (first[1], second[1]), flip)


def transform(
    pixels: NDArray[np.uint8], shape: tuple[int, int], flip: bool, down: float, right: float
) -> tuple[Tensor, Tensor]:
    """Pixels and time_ids of one image, see `PairImages`, from (height, width, 3).

    `down` and `right` say where to crop, from 0 to 1.
    """
    height, width = shape
    original_height, original_width, _ = pixels.shape
    scale = max(height / original_height, width / original_width)
    if scale != 1:
        covering = max(height, round(original_height * scale)), max(width, round(original_width * scale))
        pixels = resize(pixels, *covering)
    if flip:
        pixels = pixels[:, ::-1]
    top, left = round(down * (pixels.shape[0] - height)), round(right * (pixels.shape[1] - width))
    planes = to_planes(pixels[top : top + height, left : left + width])
    return planes, torch.tensor([original_height, original_width, top, left, height, width])


def resize(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Bilinear with antialiasing, within 1 in 255 of the exact value as Pillow's is; where there is AVX2 twice as fast.

    Args:
        pixels: (height, width, channels).
        height: pixels.
        width: pixels.
    """
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # channels last in memory: the fast way, and no copy
    resized = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def to_planes(pixels: NDArray[np.uint8]) -> Tensor:
    """(3, height, width) from a view of (height, width, 3), cropped and mirrored as it may be, in one copy."""
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))  # numpy takes half as long as torch


class ImageError(ValueError):
    """Bytes that are no image."""


def decode_pixels(data: bytes) -> NDArray[np.uint8]:
    """(height, width, 3) of what `decode` gives; JPEG by simplejpeg, where it is installed: the same, but sooner."""
    if simplejpeg is not None and data.startswith(JPEG):
        with suppress(Exception):  # Pillow decides whether a damaged file can be read, as without simplejpeg
            image = Image.open(io.BytesIO(data))
            if image.mode == "RGB" and image.getexif().get(ORIENTATION) not in range(2, 9):
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
                return pixels
    return np.array(decode(data))


def decode(data: bytes) -> Image.Image:
    """An RGB image, upright; transparent parts become white.

    Raises:
        ImageError: if it cannot be decoded.
    """
    try:
        return _decode(data)
    except Exception as error:  # on damaged files PIL raises errors of almost any kind
        words = ADDRESS.sub("it", str(error))
        raise ImageError(f"{type(error).__name__}: {words}") from error


def _decode(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    ImageOps.exif_transpose(image, in_place=True)  # else it is copied where there is nothing to turn
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
