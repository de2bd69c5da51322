"""Read published weight files, and build transformers models from them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_align.user_errors import UserValueError


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors by name, in float32, without `position_ids`, which are not weights.

    Raises:
        ValueError: if the file holds anything but named tensors, such as a pickle that runs code.
    """
    if path.suffix == ".safetensors":
        content: Any = load_file(path)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises pickle's, zip's and its own errors alike
            raise UserValueError(f"{path} holds more than weights, or is damaged; it is not loaded: {error}") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content  # HPSv2 wraps its own
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        found = type(content).__name__
        raise UserValueError(f"{path} holds a {found} instead of named tensors. Check repo and filename.")
    return {name: value.float() for name, value in content.items() if not name.endswith("position_ids")}


def build(model_class: Any, config: Any, state_dict: dict[str, Tensor], source: str, **settings: Any) -> Any:
    """Build a transformers model, in eval mode, from exactly these weights: none left over, none random.

    Args:
        model_class: class of transformers.
        config: config of transformers, for `model_class`.
        state_dict: weights by their names in `model_class`.
        source: where the weights are from, for error messages.
        settings: further arguments of `model_class`.

    Raises:
        ValueError: if a weight is missing, left over or of another shape.
    """
    # `from_pretrained` saves drawing a billion random numbers first.
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state_dict,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below
        **settings,
    )
    for problem in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, report[f"{problem}_keys"])):
            raise UserValueError(
                f"{source}: {len(keys)} {problem} weights for {model_class.__name__}, the first is {keys[0]}. "
                "The file or the config belongs to another model; check repo, filename and config_repo."
            )
    return model
