"""Autocast and fused attention for the meta device, which has neither.

The lists of operators follow torch's autocast (aten/src/ATen/autocast_mode.h and autocast_mode.cpp, torch 2.13), as far
as diffusion models and text encoders use them. Devices other than the CPU are treated as CUDA.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_align.internals import attention_kernel, tree_leaves, tree_map
from lit_align.memory.live import LiveBytes

_MATMUL = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm", "linear", "einsum"}
_CONV = {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)}
LOWER = _MATMUL | _CONV | {"scaled_dot_product_attention"}
_REDUCE = {"softmax", "log_softmax", "cumsum", "cumprod", "prod", "sum", "norm", "mse_loss", "l1_loss"}
_POINTWISE = {"exp", "log", "pow", "__pow__", "rsqrt", "reciprocal", "softplus", "cosine_similarity"}
FULL = {"cuda": _REDUCE | _POINTWISE | {"group_norm", "layer_norm"}, "cpu": {"prod", "mse_loss", "l1_loss"}}
PROMOTED = {"cat", "stack"}
FLASH_HEAD = 256  # maximal width of a head in CUDA's flash attention


class MetaAutocast(TorchFunctionMode):
    """Casts meta tensors as `torch.autocast(device, dtype)` would, with its cache of cast weights.

    Args:
        device: `cpu` or `cuda`; their lists differ: CUDA normalises in float32.
        dtype: precision of matrix products and convolutions.
        gathered: counter, if a strategy gathers weights in `dtype` already. Casts of weights are then not counted in
            it, and the caller counts the gathered weights.
    """

    def __init__(self, device: str, dtype: torch.dtype, gathered: LiveBytes | None = None) -> None:
        super().__init__()
        self.dtype, self.full, self.gathered = dtype, FULL[device], gathered
        self.caches = True
        self.weights: dict[int, Tensor] = {}  # cast weight by the id of its trained weight; autocast caches no others

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, given = getattr(func, "__name__", ""), (args, kwargs or {})
        if name in LOWER:
            given = tree_map(self._lower, given)
        elif name in self.full:
            given = tree_map(_raise, given)
        elif name in PROMOTED:
            dtypes = [leaf.dtype for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
            if torch.float32 in dtypes:
                given = tree_map(_raise, given)
        return func(*given[0], **given[1])

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in (self.dtype, torch.float64):
            return value
        if self.gathered is not None and isinstance(value, nn.Parameter):
            with self.gathered.uncounted():
                return self._cached(value)
        if not (value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(self.dtype)
        return self._cached(value) if self.caches else value.to(self.dtype)

    def _cached(self, value: Tensor) -> Tensor:
        if id(value) not in self.weights:
            self.weights[id(value)] = value.to(self.dtype)
        return self.weights[id(value)]

    def end_forward(self) -> None:
        """Drop the cache, as autocast does on exit; the graph keeps what the backward pass needs.

        A recomputation in the backward pass has its own short cache. It uses each weight once, so none is needed here.
        """
        if self.gathered is None:
            self.weights.clear()
        self.caches = False


def _raise(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


class FusedAttention(TorchFunctionMode):
    """Replaces attention by the fused kernels of a device; on the meta device torch would allocate the full matrix.

    Where only torch's `math` is enabled, the full matrix is what it allocates.

    Args:
        device: `cpu` or `cuda`.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention or not _may_fuse():
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        inputs = query, key, value
        if self.device == "cpu":
            flash = attention_kernel("flash_attention_for_cpu")
            return flash(*inputs, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        half = query.dtype in (torch.float16, torch.bfloat16)
        flash = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.cudnn_sdp_enabled()
        if flash and half and attn_mask is None and query.shape[-1] <= FLASH_HEAD:
            return attention_kernel("flash_attention")(*inputs, dropout_p, is_causal, scale=scale)[0]
        with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        efficient = attention_kernel("efficient_attention")
        return efficient(*inputs, attn_mask, with_gradients, dropout_p, is_causal, scale=scale)[0]


def _may_fuse() -> bool:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()
