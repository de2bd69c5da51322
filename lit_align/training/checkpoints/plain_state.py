"""Values of a checkpoint that a weights-only reader accepts: plain ones, to which others are converted or refused."""

from collections import Counter, OrderedDict
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_align.user_errors import UserValueError

PLAIN = {type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device, torch.Size}
MAPPINGS, SEQUENCES = (dict, OrderedDict, Counter), (list, tuple, set)


def make_plain(checkpoint: dict[str, Any]) -> None:
    """Convert numbers of numpy, arrays and paths in a checkpoint, in place, to numbers, tensors and strings.

    A checkpoint with any other value would be written, but could never be read again.

    Raises:
        UserValueError: it names the callback and the key of a value that is not plain.
    """
    for entry, value in checkpoint.items():
        if entry == "callbacks":
            checkpoint[entry] = {name: _plain(state, f"callback {name}", ()) for name, state in value.items()}
        else:
            checkpoint[entry] = _plain(value, f"checkpoint's entry {entry!r}", ())


def _plain(value: Any, owner: str, keys: tuple[Any, ...]) -> Any:
    kind = type(value)
    if kind in PLAIN or isinstance(value, Tensor):
        return value
    if kind in MAPPINGS:
        found = {_plain(key, owner, (*keys, key)): _plain(part, owner, (*keys, key)) for key, part in value.items()}
        same = all(map(_is, found, value)) and all(map(_is, found.values(), value.values()))
        return value if same else kind(found)  # the same object, as a module's weights have attributes
    if kind in SEQUENCES:
        return kind([_plain(part, owner, (*keys, number)) for number, part in enumerate(value)])
    return _converted(value, owner, keys)


def _is(first: Any, second: Any) -> bool:
    return first is second


def _converted(value: Any, owner: str, keys: tuple[Any, ...]) -> Any:
    if isinstance(value, np.generic) and type(value.item()) in PLAIN:  # not a date, nor a long double
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if isinstance(value, PurePath):
        return str(value)
    raise UserValueError(
        f"The state of the {owner} cannot be saved: {'.'.join(map(str, keys)) or 'it'} is a {type(value).__name__} "
        f"({value!r:.60}), and a checkpoint with it could not be read again. Let its state_dict return numbers, "
        "strings, tensors, and lists, tuples, sets and dicts of these."
    )
