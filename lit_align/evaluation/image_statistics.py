"""A few numbers of how images look, which change when a model is trained too far."""

import torch
from torch import Tensor

from lit_align.scoring.scorers.analytic import colourfulness, lumas, sharpness

COLOUR = ("red", "green", "blue")
DIFFERENCES = (*COLOUR, "saturated")  # compared with the base by difference, the others by ratio


def image_statistics(images: Tensor) -> dict[str, float]:
    """Compute means over images (n, 3, h, w) uint8, h and w at least 3.

    Washed-out images lose contrast and colourfulness, burnt ones gain both and saturation, blurred ones lose sharpness,
    noisy ones gain it, and a tint shifts the mean colour.

    Returns:
        red, green, blue: mean of the channel, 0 to 255.
        contrast: standard deviation of the luma, 0 to 127.5.
        colourfulness: Hasler and Süsstrunk 2003, see `Colourfulness`.
        sharpness: variance of the Laplacian of the luma, see `Sharpness`.
        saturated: share of pixels with a channel at 0 or 255, where values may have been clipped.
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
    """Compare with the base: differences of the colours and of the saturated share, ratios of the others.

    A ratio to 0 is inf, or nan if both values are 0.
    """
    return {
        name: value - base[name] if name in DIFFERENCES else (torch.tensor(value) / base[name]).item()
        for name, value in statistics.items()
    }


def describe(statistics: dict[str, float], change: dict[str, float]) -> str:
    """Write statistics in one line, with the change against the base in brackets where it is known."""
    changes = {
        name: f" ({value:+.2f})" if name in DIFFERENCES else f" (x {value:.2f})" for name, value in change.items()
    }
    return ", ".join(f"{name} {value:,.2f}{changes.get(name, '')}" for name, value in statistics.items())
