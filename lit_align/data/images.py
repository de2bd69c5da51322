"""Decode, resize and crop the two images of a pair to tensors of one size."""

import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lit_align.data.colours import ImageError
from lit_align.data.decoder import decode_pixels
from lit_align.data.shards.layout import RawPair, SampleError
from lit_align.user_errors import UserValueError

Crop = Literal["center", "random"]
FAR_LARGER = 4  # times the area of a crop: then the rest is not resized


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

    def read(self, pair: RawPair, draw: random.Random, shape: tuple[int, int]) -> PairImages:
        """Transform the images of a sample, see `__call__`; whatever fails is a failure of this sample.

        Raises:
            SampleError: naming shard and key.
        """
        try:
            return self((pair.image_0, pair.image_1), draw, shape)
        except Exception as error:  # an allocator raises errors of several classes
            words = str(error) if isinstance(error, ImageError) else f"{type(error).__name__}: {error}"
            raise SampleError(f"{pair.location}: an image cannot be decoded: {words}") from error

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
    tall, wide = max(height, round(original_height * scale)), max(width, round(original_width * scale))
    top, left = round(down * (tall - height)), round(right * (wide - width))
    begin = wide - width - left if flip else left  # in the image that is not mirrored
    if scale != 1 and tall * wide > FAR_LARGER * height * width:
        pixels = resize_crop(pixels, (tall, wide), (top, begin), shape)
    else:
        pixels = pixels if scale == 1 else resize(pixels, tall, wide)
        pixels = pixels[top : top + height, begin : begin + width]
    planes = to_planes(pixels[:, ::-1] if flip else pixels)
    return planes, torch.tensor([original_height, original_width, top, left, height, width])


def resize_crop(
    pixels: NDArray[np.uint8], size: tuple[int, int], corner: tuple[int, int], shape: tuple[int, int]
) -> NDArray[np.uint8]:
    """Make a crop of a resized image alone, as `resize` and then cutting would within 1 / 255.

    Args:
        pixels: (height, width, 3).
        size: height and width of the whole resized image.
        corner: top and left of the crop in it.
        shape: height and width of the crop.
    """
    vertical, horizontal = pixels.shape[0] / size[0], pixels.shape[1] / size[1]
    right = min((corner[1] + shape[1]) * horizontal, pixels.shape[1])
    bottom = min((corner[0] + shape[0]) * vertical, pixels.shape[0])
    box = (corner[1] * horizontal, corner[0] * vertical, right, bottom)
    return np.array(Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BILINEAR, box))


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
