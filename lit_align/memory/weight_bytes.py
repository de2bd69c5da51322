"""Count the bytes that a module holds between steps, on a real or the meta device."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from lit_align.backbones import Backbone


class WeightBytes(NamedTuple):
    """Bytes of weights, by purpose."""

    trained: int
    frozen: int  # frozen part of the denoiser, and the noise schedule
    reference: int
    encoders: int  # VAE and text encoders
    gradients: int

    @property
    def parameters(self) -> int:
        """All but the gradients."""
        return self.trained + self.frozen + self.reference + self.encoders


def weigh(backbone: Backbone) -> WeightBytes:
    """Count the bytes of a backbone in its current state: precision, reference and loaded encoders."""
    trained = list(backbone.trainable_parameters().values())
    reference = list(backbone.reference_weights().values())
    encoders = [tensor for part in backbone.loaded_encoders() for tensor in (*part.parameters(), *part.buffers())]
    named = {id(tensor) for tensor in (*trained, *reference, *encoders)}
    everything = (*backbone.parameters(), *backbone.buffers())
    return WeightBytes(
        trained=count(trained),
        frozen=count(tensor for tensor in everything if id(tensor) not in named),
        reference=count(reference),
        encoders=count(encoders),
        gradients=count(trained),
    )


def count(tensors: Iterable[Tensor]) -> int:
    """Sum the bytes of tensors, each tensor once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
