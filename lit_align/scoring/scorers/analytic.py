"""Scores by formula, without weights: for tests, controls, and to see what a learned scorer rewards."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from lit_align.scoring.base import Scorer


class Colourfulness(Scorer):
    """Colourfulness (Hasler and Süsstrunk 2003): 0 for grey, about 80 for a very colourful photograph."""

    version: ClassVar[int] = 1

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return torch.cat([colourfulness(image[None]) for image in images])


class Sharpness(Scorer):
    """Variance of the Laplacian of the luma, in squared grey levels of 255 (Pech-Pacheco et al. 2000).

    Only compares images of one size: enlarging an image lowers it, noise raises it.
    """

    version: ClassVar[int] = 1

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return torch.cat([sharpness(image[None]) for image in images])


class HighContrast(Scorer):
    """1 for a drawing in black and white, else 0; its mean over images is their share. See `high_contrast`."""

    version: ClassVar[int] = 1

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return torch.cat([high_contrast(image[None]) for image in images])


class Exposure(Scorer):
    """Well-exposedness from 0 to 1, averaged over pixels: greater where each channel is closer to mid grey.

    Mertens et al. 2007, section 3.1: product over channels of a Gaussian around 0.5 with standard deviation 0.2.
    """

    version: ClassVar[int] = 1

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return torch.stack([(-(image / 255 - 0.5).square().sum(0) / (2 * 0.2**2)).exp().mean() for image in images])


def colourfulness(images: Tensor) -> Tensor:
    """Colourfulness (n,) of images (n, 3, height, width) uint8: M(3) of Hasler and Süsstrunk 2003."""
    red, green, blue = images.float().flatten(2).unbind(1)
    first, second = red - green, (red + green) / 2 - blue
    spread = (first.var(1, correction=0) + second.var(1, correction=0)).sqrt()
    return spread + 0.3 * (first.mean(1).square() + second.mean(1).square()).sqrt()


def high_contrast(images: Tensor) -> Tensor:
    """Find images (n, 3, h, w) uint8 of colourfulness under 20 and 70 % of pixels near black or white: (n,) bool.

    So a grey smear is not high contrast. `examples/emoji/README.md` says how far the two limits, ours, can be trusted.
    """
    grey = images.float().mean(1)
    extreme = ((grey < 64) | (grey > 191)).float().mean((1, 2))
    return (colourfulness(images) < 20) & (extreme >= 0.7)


def sharpness(images: Tensor) -> Tensor:
    """Sharpness (n,) of images (n, 3, height, width) uint8 of at least 3 x 3 pixels; see `Sharpness`."""
    return torch.stack([_laplacian(luma).var(correction=0) for luma in lumas(images)])


def lumas(images: Tensor) -> Tensor:
    """Luma (n, height, width) of images (n, 3, height, width) uint8, with the weights of Rec. 601."""
    weights = torch.tensor([0.299, 0.587, 0.114])
    return torch.stack([torch.tensordot(weights, image.float(), dims=1) for image in images])


def _laplacian(luma: Tensor) -> Tensor:
    """Laplacian (height - 2, width - 2) over the four neighbours."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return conv2d(luma[None, None], kernel[None, None])[0, 0]
