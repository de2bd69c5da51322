"""Published weight files: where they lie, how they are read, and that they fit."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor

from lit_align.user_errors import UserFileNotFoundError, UserValueError


def weight_file(repo: str, filename: str, revision: str | None = None) -> Path:
    """The path of a file in `repo`, a local folder or a hub id.

    Raises:
        FileNotFoundError: if the folder or the hub's repository holds no such file.
    """
    if Path(repo).is_dir():
        path = Path(repo) / filename
        if not path.is_file():
            raise UserFileNotFoundError(f"repo: the folder {repo!r} holds no {filename!r}. Check filename.")
        return path
    try:
        return Path(hf_hub_download(repo, filename, revision=revision))
    except EntryNotFoundError as error:
        raise UserFileNotFoundError(
            f"repo: {repo!r} holds no {filename!r}, or no copy of it is here: {error}"
        ) from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name, float32, without `position_ids`, which are no weights.

    Raises:
        ValueError: if the file holds anything but tensors, such as a pickle that runs code, or no tensors by name.
    """
    if path.suffix == ".safetensors":
        content: Any = load_file(path)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises pickle's, zip's and its own errors alike
            raise UserValueError(f"{path} is no file of weights alone, and so is not opened: {error}") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content  # HPSv2 wraps its own
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserValueError(f"{path} holds no tensors by name, but {type(content).__name__}. Check repo and filename.")
    return {name: value.float() for name, value in content.items() if not name.endswith("position_ids")}


def build(model_class: Any, config: Any, state_dict: dict[str, Tensor], source: str, **settings: Any) -> Any:
    """A transformers model of these weights, every one of them used and none left random, in eval mode.

    Args:
        model_class: of transformers.
        config: of transformers, for `model_class`.
        state_dict: by the names of `model_class`.
        source: of the weights, for the error.
        settings: further arguments of `model_class`.

    Raises:
        ValueError: if a weight is missing, left over or of another shape.
    """
    # Its way through `from_pretrained` saves drawing a billion random numbers first.
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
                "The file or the config is of another model; check repo, filename and config_repo."
            )
    return model
