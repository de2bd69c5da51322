"""Count the bytes of live tensors while code runs, on any device, the meta device included."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lit_align.internals import TorchDispatchMode, reads_a_number, returns_nothing, storage_key, tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors created in this context, each storage once, until it is freed.

    Only sizes matter: on meta tensors `.item()` returns 1, and operators of other libraries that return nothing, such
    as bitsandbytes' steps, are skipped.

    Args:
        known: tensors that exist already and are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}  # bytes by the address of each counted storage
        self.now = 0
        self.peak = 0
        self._known = {storage_key(tensor.untyped_storage()) for tensor in known}
        self._counts = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if reads_a_number(func) and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        if func.namespace not in ("aten", "prims") and _on_meta(args, kwargs) and returns_nothing(func):
            return None
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage_key(storage)
        if key in self._known or key in self.alive:
            return
        if not self._counts:
            self._known.add(key)
            return
        self.alive[key] = storage.nbytes()
        self.now += self.alive[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, key)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Tensors created in this context are not counted.

        Keep references to them: a freed address may be reused by a counted one.
        """
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def counts(self, storage: torch.UntypedStorage) -> bool:
        """Whether a storage is counted."""
        return storage_key(storage) not in self._known

    def _end(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def _on_meta(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs)))


@contextmanager
def count_saved(known: Iterable[Tensor], live: LiveBytes | None = None) -> Iterator[Callable[[], int]]:
    """Count what autograd saves for the backward pass in this context; yields a function that returns the bytes.

    Each storage counts once. With gradient checkpointing, only what it keeps for the recomputation is counted.

    Args:
        known: tensors that are not counted, such as parameters.
        live: counter whose uncounted storages are not counted here either.
    """
    ours = {storage_key(tensor.untyped_storage()) for tensor in known}
    saved: dict[int, tuple[int, Tensor]] = {}  # tensors are kept so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key not in ours and (live is None or live.counts(storage)):
            saved[key] = storage.nbytes(), tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(size for size, _ in saved.values())
