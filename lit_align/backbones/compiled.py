"""Faster forms of a module, and names of their weights: the same as without torch.compile."""

from typing import Any

import torch
from torch import nn

WRAPPER = "_orig_mod."  # torch.compile(module) holds the module under this name


def plain_name(name: str) -> str:
    """Return the name that a weight has without torch.compile."""
    return name.replace(WRAPPER, "")


def name_plainly(module: nn.Module) -> None:
    """Let `state_dict` of a module, and of those that hold it, name weights as without torch.compile.

    `load_state_dict` takes both names, so that a run may begin with torch.compile and go on without it.
    """
    module.register_state_dict_post_hook(_saved)
    module.register_load_state_dict_pre_hook(_loaded)


def _saved(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    _rename(state, {name: plain_name(name) for name in state if name.startswith(prefix)})


def _loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = [name for part in (module.named_parameters(), module.named_buffers()) for name, _ in part]
    wanted = {plain_name(name): name for name in own}
    found = {name: plain_name(name.removeprefix(prefix)) for name in state if name.startswith(prefix)}
    _rename(state, {name: f"{prefix}{wanted.get(plain, plain)}" for name, plain in found.items()})


def _rename(state: dict[str, Any], names: dict[str, str]) -> None:
    """Rename keys in place; the order stays."""
    if any(old != new for old, new in names.items()):
        renamed = {names.get(name, name): value for name, value in state.items()}
        state.clear()
        state.update(renamed)


def order_channels_last(module: nn.Module) -> None:
    """Keep the weights of convolutions in channels_last order, in place; their activations then follow."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
