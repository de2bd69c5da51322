"""Bytes of what a module holds between steps, real or on the meta device."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from lit_align.backbones import Backbone


class WeightBytes(NamedTuple):
    """Bytes by what they are for."""

    trained: int
    frozen: int  # of the denoiser, and the noise schedule
    reference: int
    encoders: int  # VAE and text encoders
    gradients: int

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen + self.reference + self.encoders


def weigh(backbone: Backbone) -> WeightBytes:
    """Bytes of the backbone as it is now: cast, with its reference, and with those encoders that are loaded."""
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
    """Bytes of tensors, each once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
