"""What an optimizer keeps and needs, asked of the optimizer itself: it takes steps on the meta device."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_align.memory.live import LiveBytes


class OptimizerBytes(NamedTuple):
    """Bytes of an optimizer."""

    state: int  # between steps
    step: int  # more, at the peak of a step


def measure_optimizer(build: Callable[..., Any], weights: Sequence[Tensor], foreach: bool) -> OptimizerBytes | None:
    """Bytes that the optimizer will hold; None where it cannot be made to say.

    Args:
        build: makes it from a list of parameters, `OptimizerCallable`.
        weights: what it will train, of any device.
        foreach: whether it works on all tensors at a time where it may, as torch's own do on a GPU by default.
    """
    twins = [nn.Parameter(torch.empty_like(weight, device="meta")) for weight in weights]
    for twin in twins:
        twin.grad = torch.empty_like(twin)
    for options in ({}, {"fused": False}):  # a fused one wants a real device; what it keeps is the same
        with suppress(Exception):  # an optimizer may object to the meta device in any way
            optimizer = build(twins, **options)
            state = _state_bytes(optimizer)
            return OptimizerBytes(state, 0 if options else _step_bytes(optimizer, twins, foreach))
    return None


def _state_bytes(optimizer: Any) -> int:
    _set_foreach(optimizer, True)  # the same state, and sooner
    with LiveBytes():
        _first_step(optimizer)
    storages = [tensor.untyped_storage() for tensor in tensors(optimizer.state)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _step_bytes(optimizer: Any, twins: Sequence[nn.Parameter], foreach: bool) -> int:
    """What a later step needs beside its state; 0 where it does not say."""
    known = [*tensors(optimizer.state), *twins, *(twin.grad for twin in twins if twin.grad is not None)]
    if not foreach:  # one tensor after the other: the greatest one decides
        _set_foreach(optimizer, False)
        greatest = max(twins, key=lambda twin: twin.nbytes)
        for twin in twins:
            twin.grad = twin.grad if twin is greatest else None
    with LiveBytes(known) as live:
        try:
            optimizer.step()
        except Exception:
            return 0
    return live.peak


def _set_foreach(optimizer: Any, foreach: bool) -> None:
    for group in optimizer.param_groups:
        if "foreach" in group and not group.get("fused"):
            group["foreach"] = foreach


def _first_step(optimizer: Any) -> None:
    try:
        optimizer.step()
    except Exception:
        if not hasattr(optimizer, "init_state"):
            raise
        # bitsandbytes makes its state apart from its steps, whose kernels want a real device.
        groups = [(number, group) for number, group in enumerate(optimizer.param_groups)]
        places = [(group, twin, g, p) for g, group in groups for p, twin in enumerate(group["params"])]
        for group, twin, g, p in places:
            optimizer.init_state(group, twin, g, p)


def tensors(state: Any) -> Iterable[Tensor]:
    """All tensors of an optimizer's state, however deep."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors(value)
