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

    images: tuple[Tensor, Tensor]  # (3, resolution, resolution) uint8
    geometries: tuple[Tensor, Tensor]  # (6,) int64: original h, w; crop top, left; target h, w; pixels
    flipped: bool  # both, or neither


@dataclass(frozen=True)
class PairTransform:
    """Resize the short side (bilinear), crop and flip, with one draw for both images of a pair.

    Args:
        resolution: side of the square, pixels.
        crop: where: the middle, or a place drawn once per pair, in parts of what is left over.
        flip_probability: chance of a horizontal flip of both images.
    """

    resolution: int
    crop: Crop = "center"
    flip_probability: float = 0.5

    def __call__(self, encoded: tuple[bytes, bytes], draw: random.Random) -> PairImages:
        """Decode and transform.

        Raises:
            OSError, ValueError, SyntaxError: from PIL, where an image cannot be decoded.
        """
        flip = draw.random() < self.flip_probability
        down, right = (draw.random(), draw.random()) if self.crop == "random" else (0.5, 0.5)
        first, second = (self._transform(decode(data), flip, down, right) for data in encoded)
        return PairImages((first[0], second[0]), (first[1], second[1]), flip)

    def _transform(self, image: Image.Image, flip: bool, down: float, right: float) -> tuple[Tensor, Tensor]:
        size = self.resolution
        original_height, original_width = image.height, image.width
        if min(image.size) != size:
            scale = size / min(image.size)
            width, height = (max(size, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if flip:
            image = ImageOps.mirror(image)
        top, left = round(down * (image.height - size)), round(right * (image.width - size))
        image = image.crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels, torch.tensor([original_height, original_width, top, left, size, size])


def decode(data: bytes) -> Image.Image:
    """An RGB image, upright; transparent parts become white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
