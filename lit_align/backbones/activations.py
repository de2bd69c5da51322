"""What a denoiser's forward pass keeps for the backward pass, and where it waits."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lit_align.backbones.sharding import Denoiser, to_local
from lit_align.common.choices import Checkpointing
from lit_align.user_errors import UserValueError

# Operators by torch's names: a linear layer is `mm` or `addmm`, and each kernel of attention is one.
PRODUCTS = {"aten.mm.default": 0, "aten.addmm.default": 1, "aten.bmm.default": 0, "aten.baddbmm.default": 1}
ATTENTION = {
    f"aten._scaled_dot_product_{kernel}.default"
    for kernel in (
        "flash_attention_for_cpu",
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",  # of other devices
    )
}
CONVOLUTION = "aten.convolution.default"
MAIN_MEMORY = torch.device("cpu")
LEAST_TERMS = 64  # of a sum; a product of shorter ones, such as an adapter's second factor, costs little to repeat


def checkpoint_blocks(denoiser: Denoiser, checkpointing: Checkpointing, offload: bool, compiles: bool) -> None:
    """Let a denoiser's blocks recompute activations in the backward pass, in place.

    Args:
        denoiser: UNet of diffusers.
        checkpointing: true: all of a block's activations; `selective`: those that are cheap to compute.
        offload: whether activations wait in main memory.
        compiles: whether blocks are compiled.

    Raises:
        UserValueError: if `selective` is set with one of the other options.
    """
    if checkpointing not in (True, False, "selective"):
        raise UserValueError(
            f"model.backbone.gradient_checkpointing is {checkpointing!r}; choose true, false or selective."
        )
    if checkpointing == "selective":
        if compiles:
            raise UserValueError(
                "model.backbone.gradient_checkpointing is selective, which chooses between single operators, but with "
                "model.backbone.compile true they are fused. Set the one to true, or the other to false."
            )
        if offload:
            raise UserValueError(
                "model.backbone.gradient_checkpointing is selective, whose results stay on the device, but "
                "model.backbone.activation_offload is true. Set the one to true, or the other to false."
            )
        denoiser.enable_gradient_checkpointing(_checkpoint_selectively)
    elif checkpointing:
        denoiser.enable_gradient_checkpointing()


def _checkpoint_selectively(block: nn.Module, *inputs: Any) -> Any:
    kept = _KeptResults()
    contexts = partial(create_selective_checkpoint_contexts, kept)
    outputs = checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
    kept.show()
    return outputs


class _KeptResults:
    """Chooses the results that a block's forward pass keeps, for `create_selective_checkpoint_contexts`."""

    def __init__(self) -> None:
        self.results: list[Tensor] = []

    def __call__(self, context: Any, operator: Any, *inputs: Any, **_: Any) -> CheckpointPolicy:
        if not is_expensive(str(operator), inputs):
            return CheckpointPolicy.PREFER_RECOMPUTE
        result = getattr(context, "op_output", ())  # older versions of torch ask before the result is there
        results = result if isinstance(result, tuple | list) else [result]
        self.results += [result for result in results if isinstance(result, Tensor)]
        return CheckpointPolicy.MUST_SAVE

    def show(self) -> None:
        """Show what is kept to the hooks for saved tensors, as autograd shows what it saves: memory counts both."""
        results, self.results = [result.detach() for result in self.results], []
        _Saved.apply(torch.empty(0, requires_grad=True), *results)


class _Saved(torch.autograd.Function):
    """Saves tensors for as long as its output lives."""

    @staticmethod
    def forward(ctx: Any, with_gradient: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return with_gradient.new_empty(0)


def is_expensive(operator: str, inputs: tuple[Any, ...]) -> bool:
    """Whether an operator takes so much arithmetic that its result is better kept than computed again.

    Args:
        operator: name in torch's dispatcher, such as `aten.mm.default`.
        inputs: positional arguments.
    """
    if operator in PRODUCTS:
        terms: int = inputs[PRODUCTS[operator]].shape[-1]
        return terms >= LEAST_TERMS
    return operator == CONVOLUTION or operator in ATTENTION


def offloaded(denoiser: nn.Module, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which what autograd saves waits in main memory; one without effect on a CPU."""
    return nullcontext() if device.type in ("cpu", "meta") else Offload(denoiser, device)


class Offload(saved_tensors_hooks):
    """Copies what autograd saves from a device to main memory, and back when the backward pass asks for it.

    Like `torch.autograd.graph.save_on_cpu`, but weights stay where they are, each storage moves once however many
    tensors share it, and the order of dimensions stays. Copies wait in the device's stream, so no step reads a part of
    one. Nothing may change a saved tensor in place meanwhile: torch does not check what hooks have packed.

    Args:
        denoiser: module whose weights stay.
        device: device whose tensors move.
        home: device to which they move.
    """

    def __init__(self, denoiser: nn.Module, device: torch.device, home: torch.device = MAIN_MEMORY) -> None:
        super().__init__(self._pack, self._unpack)
        self.device, self.home = device, home
        self.weights = WeakSet(to_local(weight).untyped_storage() for weight in denoiser.parameters())
        self.moved: WeakKeyDictionary[UntypedStorage, _Moved] = WeakKeyDictionary()

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self.moved.clear()  # the graph holds what it needs

    def stays(self, tensor: Tensor) -> bool:
        """Whether a saved tensor is left on its device."""
        if type(tensor) is not Tensor or tensor.device.type != self.device.type:
            return True
        return tensor.untyped_storage() in self.weights

    def send(self, content: Tensor) -> Tensor:
        """Copy a storage's bytes (n,) to `home`."""
        there = torch.empty_like(content, device=self.home, pin_memory=content.is_cuda)
        return there.copy_(content, non_blocking=content.is_cuda)

    @torch.no_grad()
    def _pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        if self.stays(tensor):
            kept = tensor.detach()  # a hook that returns its tensor would make a cycle
            return lambda: kept
        storage = tensor.untyped_storage()
        moved = self.moved.get(storage)
        if moved is None or moved.version != tensor._version:
            moved = self.moved[storage] = _Moved(self.send(_content(storage, tensor.device)), tensor)
        return partial(moved.tensor, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    @torch.no_grad()
    def _unpack(self, packed: Callable[[], Tensor]) -> Tensor:
        return packed()


class _Moved:
    """A storage's bytes in main memory, and on their device as long as the backward pass uses them."""

    def __init__(self, content: Tensor, tensor: Tensor) -> None:
        self.content, self.device, self.version = content, tensor.device, tensor._version
        self.back: ReferenceType[UntypedStorage] | None = None

    def tensor(self, dtype: torch.dtype, offset: int, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
        """Return a saved tensor on its device; those that are alive at one time share a storage as before."""
        storage = None if self.back is None else self.back()
        if storage is None:
            content = torch.empty_like(self.content, device=self.device)
            content.copy_(self.content, non_blocking=self.device.type == "cuda")
            storage = content.untyped_storage()
            self.back = ref(storage)
        return torch.empty(0, dtype=dtype, device=self.device).set_(storage, offset, shape, stride)


def _content(storage: UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
