"""Sharded checkpoints: folders to which every device has written its part, in torch.distributed.checkpoint's format.

torch's own reader unpickles the index and all values that are not tensors, and so executes code from a foreign folder.
This one only unpickles plain records.
"""

import io
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint import load as load_distributed
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from lit_align.user_errors import UserValueError

META = "meta.pt"  # Lightning's file for everything but weights and optimizer state
INDEX = ".metadata"  # torch's index of the parts
STATE = "state_dict."
RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float16", "bfloat16", "float32", "float64", "int64", "int32", "uint8", "bool"},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


class _Records(pickle.Unpickler):
    """Unpickles the plain records of an index, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"its index names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_index(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        *path, key = self.mappings[read_item.dest_index.fqn]
        container: Any = self.original_state_dict
        for step in path:
            container = container[step]
        container[key] = torch.load(value, weights_only=True)


def is_sharded(path: Path) -> bool:
    """Whether this is a sharded checkpoint."""
    return path.is_dir() and (path / META).is_file()


def is_resumable(meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this `meta.pt` has optimizer states: Lightning writes both or neither."""
    return "lr_schedulers" in meta


def check_whole(path: Path) -> None:
    """Check that every part that the index names is complete.

    Raises:
        ValueError: if a part is missing or cut.
    """
    ends: dict[str, int] = {}
    for info in read_index(path).storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        part = path / name
        if not part.is_file() or part.stat().st_size < end:
            raise UserValueError(f"its part {name} is {'cut' if part.is_file() else 'missing'}")


def replace_folder(path: Path, new: Path) -> None:
    """Replace `path` by the complete folder `new`; the old one stays beside it as `.NAME.old` until that is done."""
    with (new / META).open("rb") as file:
        os.fsync(file.fileno())
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def read_index(path: Path) -> Metadata:
    """Read the index of a sharded checkpoint.

    Raises:
        ValueError: if it is missing, damaged, or contains more than an index.
    """
    try:
        with (path / INDEX).open("rb") as file:
            metadata = _Records(file).load()
    except (pickle.UnpicklingError, EOFError, OSError) as error:
        raise UserValueError(f"{path} is not a checkpoint, or is damaged: {error}") from error
    if not isinstance(metadata, Metadata):
        raise UserValueError(f"{path} is not a checkpoint, or is damaged: its index is a {type(metadata).__name__}.")
    return metadata


def meta_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a sharded checkpoint by name, as meta tensors: shapes without values."""
    found = read_index(path).state_dict_metadata
    return {
        name.removeprefix(STATE): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in found.items()
        if name.startswith(STATE) and isinstance(entry, TensorStorageMetadata)
    }


def read_into(state: dict[str, Any], path: Path) -> None:
    """Read the entries that `state` names, tensors in place. A collective if there are several devices."""
    load_distributed(state, storage_reader=_Reader(path), planner=_Planner())


def read_full(path: Path, prefix: str) -> dict[str, Tensor]:
    """Read the full weights whose names begin with `prefix`, on the CPU of one process."""
    found = {name: weight for name, weight in meta_weights(path).items() if name.startswith(prefix)}
    weights = {name: torch.empty_like(weight, device="cpu") for name, weight in found.items()}
    load_distributed({STATE[:-1]: weights}, storage_reader=_Reader(path), planner=_Planner(), no_dist=True)
    return weights
