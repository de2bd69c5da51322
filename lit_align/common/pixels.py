"""Tensors (3, height, width) uint8 to Pillow's images and to encoded files, and back."""

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def to_image(pixels: Tensor) -> Image.Image:
    """Convert (3, height, width) uint8, on the CPU, to an RGB image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def from_image(image: Image.Image) -> Tensor:
    """Convert an image to (3, height, width) uint8, RGB."""
    image = image.convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def encode_image(pixels: Tensor, image_format: str = "png", **options: Any) -> bytes:
    """Encode (3, height, width) uint8 as a file; `options` are those of Pillow's format, such as `quality`."""
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()
