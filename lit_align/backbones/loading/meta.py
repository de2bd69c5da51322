"""Models as they are stored, or their shapes alone: what a run would need can be told without reading its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers import ConfigMixin
from torch import nn

from lit_align.backbones.loading.hub import Source

_shapes_only: ContextVar[bool] = ContextVar("shapes_only", default=False)


@contextmanager
def shapes_only() -> Iterator[None]:
    """A context in which backbones are built from their configs, on the meta device, without weights."""
    before = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(before)


def load_model(kind: Any, source: Source, dtype: torch.dtype) -> Any:
    """A model of diffusers or transformers, whose base classes are not typed, in `dtype`.

    Raises:
        OSError: if its config, or outside of `shapes_only` its weights, cannot be found.
    """
    if not _shapes_only.get():
        return kind.from_pretrained(source.repo, variant=source.variant, dtype=dtype, **source.place)
    with torch.device("meta"):
        if issubclass(kind, ConfigMixin):
            model = kind.from_config(kind.load_config(source.repo, **source.place))
        else:
            model = kind(kind.config_class.from_pretrained(source.repo, **source.place))
    return nn.Module.to(model, dtype).eval()  # diffusers' own `to` warns
