"""Turn images of any size into the square, normalised batch that a vision transformer takes."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from lit_align.common.pixels import from_image, to_image

# Statistics of OpenAI CLIP's training images (github.com/openai/CLIP, clip/clip.py `_transform`), also used by
# LAION's CLIP, PickScore, HPSv2 and ImageReward.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def centre_crops(images: Sequence[Tensor], size: int) -> Tensor:
    """Resize the short side to `size` and crop the centre: (batch, 3, size, size) float32 of (3, height, width) uint8.

    CLIP's preprocessing: torchvision's Resize(size, bicubic) and CenterCrop(size) of PIL images, with their rounding.
    transformers' PIL processor rounds the crop down, which shifts it by a pixel where 3, 7, ... pixels are cut.
    """
    return _normalised(images, lambda image: _centre_crop(image, size))


def padded_squares(images: Sequence[Tensor], size: int) -> Tensor:
    """Resize the long side to `size` and pad with black: (batch, 3, size, size) float32 of (3, height, width) uint8.

    HPSv2's `ResizeMaxSize` (hpsv2/src/open_clip/transform.py) on float images: values are neither rounded nor clamped.
    Unlike HPSv2 this also pads a non-square image whose long side is `size` already; there the model refuses it.
    """
    return _normalised(images, lambda image: _padded_square(image, size))


def _centre_crop(image: Tensor, size: int) -> Tensor:
    height, width = image.shape[1:]
    new_width, new_height = (int(size * side / min(width, height)) for side in (width, height))
    picture = to_image(image).resize((new_width, new_height), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2.0) for side in (new_width, new_height))  # half to even, as in torchvision
    picture = picture.crop((left, top, left + size, top + size))
    return from_image(picture) / 255


def _padded_square(image: Tensor, size: int) -> Tensor:
    scale = size / float(max(image.shape[1:]))
    height, width = (max(1, round(side * scale)) for side in image.shape[1:])
    pixels = image[None] / 255
    if (height, width) != tuple(image.shape[1:]):
        # As torchvision resizes float tensors; antialias is its default since 0.17, and HPSv2 pins no version.
        pixels = interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return pad(pixels[0], (left, size - width - left, top, size - height - top))


def _normalised(images: Sequence[Tensor], resize: Callable[[Tensor], Tensor]) -> Tensor:
    pixels = torch.stack([resize(image) for image in images])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std
