"""Clip the gradients of an optimizer step."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from lit_align.backbones.sharding import to_full


def clip(weights: Sequence[nn.Parameter], most: float | None, algorithm: str | None) -> Tensor:
    """Clip gradients in place, and return the Euclidean norm of all from before, scalar.

    It waits for no device. A collective if the weights are sharded.

    Args:
        weights: with gradients.
        most: largest norm of all gradients, or largest absolute value of each; None or 0 does not clip.
        algorithm: `value`, or `norm` and None for the norm.
    """
    norm = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    if most is not None and most > 0 and algorithm == "value":
        clip_grad_value_(weights, most)
    elif most is not None and most > 0:
        clip_grads_with_norm_(weights, most, norm)
    return to_full(norm)
