"""The values that pass between rooms."""

from typing import NamedTuple

from torch import Tensor


class PreferenceBatch(NamedTuple):
    """Preference pairs, ordered: which image is preferred has been decided, by the human label or by a vote."""

    chosen: Tensor  # (batch, 3, height, width) uint8, or from a cache (batch, moments, channels, h, w) int16, see below
    rejected: Tensor  # the same shape
    prompts: list[str]  # batch of them
    weight: Tensor  # (batch,) float32: 1 for a pair that counts, 0 for one that is unreadable or undecided
    chosen_geometry: Tensor  # (batch, 6) original h, w; crop top, left; target h, w (SDXL's order), pixels
    rejected_geometry: Tensor  # (batch, 6)
    number: Tensor  # (batch,) the pair's number in its data set: the seed of a fixed draw
    flipped: Tensor  # (batch,) bool: whether both images are mirrored
    human: Tensor  # (batch,) int64: 1 where the human label agrees with this order, -1 where not, 0 for a tie
    voted: bool  # whether the order is that of a vote of scorers, and of its tie rule
    strength: Tensor  # (batch,) float32: share of the votes that are for this order; 0 where the tie rule decided
    faults: tuple[str, ...] = ()  # why pairs could not be read, which have no weight then
    conditioning: dict[str, Tensor] = {}  # noqa: RUF012  # (batch + 1, ...) float16: prompts and, last, the empty one

    # A cache holds moments of the VAE's posterior before scaling, mean and deviation, or one sample of it: the int16
    # numbers are the bits of float16 ones. Without one `conditioning` is empty, and the prompts are to be encoded.
    # Geometry and number are int64 and images uint8 or int16 because Lightning casts floating point inputs to the
    # Trainer's precision, and bfloat16 cannot hold sizes such as 683 or 1001.


class PairErrors(NamedTuple):
    """Denoising errors of a batch of pairs: mean squared error of each image over its own elements."""

    chosen: Tensor  # (batch,) float32
    rejected: Tensor  # (batch,) float32


class ObjectiveOutput(NamedTuple):
    """What an objective makes of the errors."""

    loss: Tensor  # scalar: mean over the pairs that count
    margin: Tensor  # (batch,) positive where the policy prefers the chosen image
    terms: dict[str, Tensor]  # what else there is to log, by its name in the log, (batch,) each, detached
