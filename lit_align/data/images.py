"""Decode, resize and crop the two images of a pair to tensors of one size."""

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

from lit_align.user_errors import UserValueError

Crop = Literal["center", "random"]
ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")  # of an object in memory; meaningless to a reader
JPEG = b"\xff\xd8\xff"  # first bytes of a file
ORIENTATION = 0x0112  # in EXIF; 2 to 8 ask for a rotation or reflection
simplejpeg: Any = import_module("simplejpeg") if find_spec("simplejpeg") else None  # the extra `fast`


class PairImages(NamedTuple):
    """Both images of a pair, and SDXL's micro-conditioning of each."""

    images: tuple[Tensor, Tensor]  # (3, height, width) uint8
    time_ids: tuple[Tensor, Tensor]  # (6,) int64: original h, w; crop top, left; target h, w; pixels
    flipped: bool  # both images, or neither


@dataclass(frozen=True)
class PairTransform:
    """Resize (bilinear) both images of a pair to cover a shape, flip and crop them, with one draw for both.

    Args:
        crop: `center`, or `random`: one relative position per pair.
        flip_probability: of a horizontal flip of both images.
    """

    crop: Crop = "center"
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.flip_probability <= 1:
            raise UserValueError(f"data.flip_probability is {self.flip_probability}; it must lie between 0 and 1.")

    def __call__(self, encoded: tuple[bytes, bytes], draw: random.Random, shape: tuple[int, int]) -> PairImages:
        """Decode both images, and resize and crop each to `shape` (height, width; pixels) without distortion.

        Raises:
            ImageError: if an image cannot be decoded.
        """
        flip = draw.random() < self.flip_probability
        down, right = (draw.random(), draw.random()) if self.crop == "random" else (0.5, 0.5)
        first, second = (transform(decode_pixels(data), shape, flip, down, right) for data in encoded)
        return PairImages((first[0], second[0]), (first[1], second[1]), flip)


def transform(
    pixels: NDArray[np.uint8], shape: tuple[int, int], flip: bool, down: float, right: float
) -> tuple[Tensor, Tensor]:
    """Transform one image, (height, width, 3), into the pixels and time ids of `PairImages`.

    Args:
        pixels: (height, width, 3).
        shape: height and width of the result, pixels.
        flip: mirror it horizontally.
        down: vertical position of the crop, from 0 (top) to 1 (bottom).
        right: horizontal position of the crop, from 0 (left) to 1 (right).
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
    """Resize (height, width, channels), bilinear with antialiasing, to `height` and `width` pixels.

    Like Pillow's, the result is within 1 / 255 of the exact value; with AVX2 this is twice as fast.
    """
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # channels last in memory is fast and needs no copy
    resized = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def to_planes(pixels: NDArray[np.uint8]) -> Tensor:
    """Convert (height, width, 3), also a cropped or mirrored view, into (3, height, width) with one copy."""
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))  # numpy takes half as long as torch


class ImageError(ValueError):
    """Raised for bytes that cannot be decoded as an image."""


def decode_pixels(data: bytes) -> NDArray[np.uint8]:
    """Decode an image to (height, width, 3), equal to `decode`; simplejpeg, if installed, is faster on JPEG files."""
    if simplejpeg is not None and data.startswith(JPEG):
        with suppress(Exception):  # Pillow decides whether a damaged file is readable
            image = Image.open(io.BytesIO(data))
            if image.mode == "RGB" and image.getexif().get(ORIENTATION) not in range(2, 9):
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
                return pixels
    return np.array(decode(data))


def decode(data: bytes) -> Image.Image:
    """Decode an image to RGB, EXIF rotation applied and transparency on white.

    Raises:
        ImageError: if it cannot be decoded.
    """
    try:
        return _decode(data)
    except Exception as error:  # on damaged files Pillow raises errors of any class
        words = ADDRESS.sub("it", str(error))
        raise ImageError(f"{type(error).__name__}: {words}") from error


def _decode(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    ImageOps.exif_transpose(image, in_place=True)  # otherwise upright images are copied too
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
