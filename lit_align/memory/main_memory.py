"""Bytes of activations that wait in main memory, and what a device has without them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_align.backbones.activations import Offload
from lit_align.memory.live import LiveBytes


class MeasuredOffload(Offload):
    """Moves saved tensors as a run does, to `home`, and counts what has moved.

    Args:
        denoiser: module whose weights stay.
        device: device whose tensors move.
        live: counter of the device, which does not count what has moved, nor moves what the counter leaves out.
        home: where the tensors wait; the device itself for meta tensors, which take no memory.
    """

    def __init__(self, denoiser: nn.Module, device: torch.device, live: LiveBytes, home: torch.device) -> None:
        super().__init__(denoiser, device, home)
        self.live, self.sent = live, list[Tensor]()  # kept so that no address is reused

    @contextmanager
    def counted(self) -> Iterator[Callable[[], int]]:
        """Move what autograd saves in this context; yields a function that returns the bytes moved."""
        with self:
            yield lambda: sum(content.nbytes for content in self.sent)

    def stays(self, tensor: Tensor) -> bool:
        return super().stays(tensor) or not self.live.counts(tensor.untyped_storage())

    def send(self, content: Tensor) -> Tensor:
        with self.live.uncounted():
            self.sent.append(super().send(content))
        return self.sent[-1]
