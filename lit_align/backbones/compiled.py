"""Names of weights in modules that torch.compile has wrapped: the same as without it."""

from typing import Any

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
