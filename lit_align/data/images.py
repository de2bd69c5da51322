"""From two encoded images to two tensors of one size."""

import io
import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Crop = Literal["center", "random"]


class PairImages(NamedTuple):
    """Both images of a pair, and SDXL's micro-conditioning of each."""

    images: tuple[Tensor, Tensor]  # (3, height, width) uint8
    geometries: tuple[Tensor, Tensor]  # (6,) int64: original h, w; crop top, left; target h, w; pixels
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
        first, second = (transform(decode(data), shape, flip, down, right) for data in encoded)
        return PairImages((first[0], second[0]), (first[1], second[1]), flip)


def transform(
    image: Image.Image, shape: tuple[int, int], flip: bool, down: float, right: float
) -> tuple[Tensor, Tensor]:
    """Pixels and geometry of one image, see `PairImages`; `down` and `right` say where to crop, from 0 to 1."""
    height, width = shape
    original_height, original_width = image.height, image.width
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        resized = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(resized, Image.Resampling.BILINEAR)
    if flip:
        image = ImageOps.mirror(image)
    top, left = round(down * (image.height - height)), round(right * (image.width - width))
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels, torch.tensor([original_height, original_width, top, left, height, width])


class ImageError(ValueError):
    """Bytes that are no image."""


def decode(data: bytes) -> Image.Image:
    """An RGB image, upright; transparent parts become white.

    Raises:
        ImageError: if it cannot be decoded.
    """
    try:
        return _decode(data)
    except Exception as error:  # on damaged files PIL raises errors of almost any kind
        raise ImageError(f"{type(error).__name__}: {error}") from error


def _decode(data: bytes) -> Image.Image:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
