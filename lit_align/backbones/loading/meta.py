"""Load models with their weights, or only their shapes, so that a run's memory is known without reading weights."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers import ConfigMixin
from torch import nn

from lit_align.common.hub import ModelLocation
from lit_align.user_errors import UserValueError

ONE_MODEL = "Its config.json and its weights must belong to one model."
_shapes_only: ContextVar[bool] = ContextVar("shapes_only", default=False)
_frozen_dtype: ContextVar[torch.dtype] = ContextVar("frozen_dtype", default=torch.float32)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build backbones created in this context from their configs, on the meta device, without weights."""
    before = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(before)


@contextmanager
def load_frozen_in(dtype: torch.dtype) -> Iterator[None]:
    """Load what a LoRA leaves frozen in the compute precision, in backbones created in this context.

    Without it the frozen denoiser is loaded in float32 and rounded when training begins, to equal bits. A base in NF4
    is made of float32 weights in any case.
    """
    before = _frozen_dtype.set(dtype)
    try:
        yield
    finally:
        _frozen_dtype.reset(before)


def frozen_dtype() -> torch.dtype:
    """Return the precision in which frozen denoisers are loaded, see `load_frozen_in`."""
    return _frozen_dtype.get()


def load_model(model_class: Any, location: ModelLocation, dtype: torch.dtype) -> Any:
    """Load a model of diffusers or transformers, whose base classes are not typed, in `dtype`.

    Raises:
        OSError: if its config, or outside of `shapes_only` its weights, cannot be found.
        UserValueError: if the weights are not those of the config.
    """
    repo, options = location.repo, location.load_options
    if not _shapes_only.get():
        try:
            model, report = model_class.from_pretrained(
                repo, variant=location.variant, dtype=dtype, output_loading_info=True, **options
            )
        except (RuntimeError, ValueError) as error:  # shapes that differ
            raise UserValueError(f"{location}: {str(error).splitlines()[0][:200]} {ONE_MODEL}") from error
        # A text encoder may be a part of a file, or have fewer layers than it: what CLIP skip means.
        unused = report["unexpected_keys"] if issubclass(model_class, ConfigMixin) else ()
        _check_complete(location, report["missing_keys"], unused)
        return model
    with torch.device("meta"):
        if issubclass(model_class, ConfigMixin):
            model = model_class.from_config(model_class.load_config(repo, **options))
        else:
            model = model_class(model_class.config_class.from_pretrained(repo, **options))
    return nn.Module.to(model, dtype).eval()  # diffusers' own `to` warns


def _check_complete(location: ModelLocation, missing: Collection[str], unused: Collection[str]) -> None:
    """Refuse weights that leave a part of the model random, or that a config without their part would drop."""
    for fault, names in (
        ("lacks", sorted(missing)),
        ("holds weights that config.json has no place for:", sorted(unused)),
    ):
        if names:
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            raise UserValueError(f"{location} {fault} {', '.join(names[:2])}{more}. {ONE_MODEL}")
