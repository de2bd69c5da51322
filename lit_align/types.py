"""The values that pass between rooms."""

from typing import NamedTuple

from torch import Tensor


class PreferenceBatch(NamedTuple):
    """Preference pairs, ordered: which image is preferred has been decided, ties are out."""

    chosen: Tensor  # (batch, 3, height, width) uint8
    rejected: Tensor  # the same shape
    prompts: list[str]  # batch of them
    weight: Tensor  # (batch,) float32: 1 for a pair that counts, 0 for one that could not be read
    chosen_geometry: Tensor  # (batch, 6) original h, w; crop top, left; target h, w (SDXL's order), pixels
    rejected_geometry: Tensor  # (batch, 6)
    number: Tensor  # (batch,) the pair's number in its data set: the seed of a fixed draw

    # Geometry and number are int64 and images uint8 because Lightning casts floating point inputs to the
    # Trainer's precision, and bfloat16 cannot hold sizes such as 683 or 1001.


class PairErrors(NamedTuple):
    """Denoising errors of a batch of pairs: mean squared error of each image over its own elements."""

    chosen: Tensor  # (batch,) float32
    rejected: Tensor  # (batch,) float32


class ObjectiveOutput(NamedTuple):
    """What an objective makes of the errors."""

    loss: Tensor  # scalar: mean over the pairs that count
    margin: Tensor  # (batch,) positive where the policy prefers the chosen image
    terms: dict[str, Tensor]  # the loss's parts, (batch,) each, detached, for the log
