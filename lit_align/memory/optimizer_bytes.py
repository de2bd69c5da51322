"""Measure an optimizer's memory by letting it take steps on the meta device."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_align.internals import storage_key
from lit_align.memory.live import LiveBytes


class OptimizerBytes(NamedTuple):
    """Bytes that an optimizer needs."""

    state: int  # between steps
    step: int  # on top of that, at the peak of a step


def measure_optimizer(build: Callable[..., Any], weights: Sequence[Tensor], foreach: bool) -> OptimizerBytes | None:
    """Measure an optimizer's memory; None if it does not run on the meta device.

    Args:
        build: builds it from a list of parameters, `OptimizerCallable`.
        weights: weights that it will train, on any device.
        foreach: whether it updates all tensors at once where it can, as torch's optimizers do on a GPU by default.
    """
    alike = Counter((weight.shape, weight.dtype) for weight in weights)
    one_by_one = getattr(build, "steps_one_by_one", False)  # then weights of one shape are measured once, for time
    kinds = list(alike) if one_by_one else [(weight.shape, weight.dtype) for weight in weights]
    twins = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape, dtype in kinds]
    for twin in twins:
        twin.grad = torch.empty_like(twin)
    counts: dict[Tensor, int] = {}
    if one_by_one:
        counts |= {twin: alike[kind] for twin, kind in zip(twins, kinds, strict=True)}
    for options in ({}, {"fused": False}):  # fused optimizers need a real device; unfused ones have equal states
        with suppress(Exception):  # optimizers without meta support raise various errors
            optimizer = build(twins, **options)
            state = _state_bytes(optimizer, counts)
            return OptimizerBytes(state, 0 if options else _step_bytes(optimizer, twins, foreach))
    return None


def _state_bytes(optimizer: Any, counts: Mapping[Tensor, int]) -> int:
    """Measure the states of all weights; `counts` says for how many weights one stands, 1 if it is not there."""
    _set_foreach(optimizer, True)  # faster, with equal states
    with LiveBytes():
        _first_step(optimizer)
    found = dict[int, int]()
    for weight, state in optimizer.state.items():
        storages = [tensor.untyped_storage() for tensor in tensors(state)]
        found |= {storage_key(storage): storage.nbytes() * counts.get(weight, 1) for storage in storages}
    return sum(found.values())


def _step_bytes(optimizer: Any, twins: Sequence[nn.Parameter], foreach: bool) -> int:
    """Measure what a later step needs beside the state; 0 if it does not run on the meta device."""
    known = [*tensors(optimizer.state), *twins, *(twin.grad for twin in twins if twin.grad is not None)]
    if not foreach:  # one tensor at a time: the largest one decides
        _set_foreach(optimizer, False)
        largest = max(twins, key=lambda twin: twin.nbytes)
        for twin in twins:
            twin.grad = twin.grad if twin is largest else None
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
        # bitsandbytes can create its state without a step, whose kernels need a real device.
        for g, group in enumerate(optimizer.param_groups):
            for p, twin in enumerate(group["params"]):
                optimizer.init_state(group, twin, g, p)


def tensors(state: Any) -> Iterable[Tensor]:
    """Yield all tensors of an optimizer's state, at any depth."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors(value)
