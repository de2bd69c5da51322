"""What images look like, in a few numbers that move when a model is trained too far."""

import torch
from torch import Tensor

from lit_align.scoring.scorers.analytic import colourfulness, lumas, sharpness

COLOUR = ("red", "green", "blue")
DIFFERENCES = (*COLOUR, "saturated")  # from the base; of the others the ratio says more


def image_statistics(images: Tensor) -> dict[str, float]:
    """Means over images (n, 3, h, w) uint8, h and w at least 3.

    Washed out images lose contrast and colourfulness, burnt ones gain both and saturation, blurred ones lose sharpness,
    noisy ones gain it, and a tint moves the mean colour.

    Returns:
        red, green, blue: mean colour, 0 to 255.
        contrast: standard deviation of an image's luma, 0 to 127.5.
        colourfulness: of Hasler and Süsstrunk, see `Colourfulness`.
        sharpness: variance of the Laplacian of the luma, see `Sharpness`.
        saturated: share of pixels of which a channel is 0 or 255, where it may have been cut off.
    """
    means = images.float().mean((0, 2, 3)).tolist()
    saturated = ((images == 0) | (images == 255)).any(1)  # (n, h, w)
    values = {
        "contrast": lumas(images).std((1, 2), correction=0),
        "colourfulness": colourfulness(images),
        "sharpness": sharpness(images),
        "saturated": saturated.float().mean((1, 2)),
    }
    return dict(zip(COLOUR, means, strict=True)) | {name: value.mean().item() for name, value in values.items()}


def against_base(statistics: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """How far from the base: differences of the colours and of the saturated share, ratios of the others.

    A ratio to nothing is inf, or nan where there is nothing in both.
    """
    return {
        name: value - base[name] if name in DIFFERENCES else (torch.tensor(value) / base[name]).item()
        for name, value in statistics.items()
    }


def describe(statistics: dict[str, float], change: dict[str, float]) -> str:
    """One line, with the change against the base where there is one."""
    changes = {
        name: f" ({value:+.2f})" if name in DIFFERENCES else f" (x {value:.2f})" for name, value in change.items()
    }
    return ", ".join(f"{name} {value:,.2f}{changes.get(name, '')}" for name, value in statistics.items())
