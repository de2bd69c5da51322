"""The files of a cache: latents of each shard's pairs, conditioning of each prompt, and what all of it was made from.

CACHE/fingerprint.json              encoders, resolution and rules; the shards, and how many samples each has
CACHE/00000.latents.safetensors     of 00000.tar: a tensor per sample, by its number among all samples of the shard
CACHE/prompts.parquet               all prompts, each once, in the order of their ids; the empty one is number 0
CACHE/prompts-00000.safetensors     conditioning of prompts 0 to 1023, and so on

Numbers are float16. Nothing is here before it is whole.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_align.data.shards.storage import is_url
from lit_align.user_errors import UserValueError

FORMAT = 1
FINGERPRINT, PROMPTS = "fingerprint.json", "prompts.parquet"
PROMPTS_PER_FILE = 1024
NAMES = {torch.float16: "F16", torch.int32: "I32", torch.int64: "I64"}  # in safetensors' headers

Flips = Literal["both", "none"]
Posterior = Literal["moments", "sample"]


class CachedShard(NamedTuple):
    """What the cache holds of a shard."""

    latents: dict[int, Tensor]  # by row: (flips, 2, moments, channels, h, w) float16, image 0 first, unmirrored first
    prompt: Tensor  # (samples,) int32 id; -1 for a sample that is no pair
    content: Tensor  # (samples,) int64: the bits of `content_digest`; 0 for a sample that is no pair
    key: Tensor  # (samples,) int64: the bits of `key_digest`; 0 for a sample that is no pair
    time_ids: Tensor  # (samples, 2, 6) int64, see `PreferenceBatch`; the same for both flips


def rules(
    encoders: Mapping[str, str], resolution: int, aspect_buckets: bool, flips: Flips, posterior: Posterior
) -> dict[str, Any]:
    """What decides the numbers in a cache, as its fingerprint says it; a run may want some of these.

    Args:
        encoders: which these are, see `Encoders.encoders_identity`.
        resolution: of the images, pixels.
        aspect_buckets: whether they keep their aspect ratio, about.
        flips: whether each is there mirrored too.
        posterior: mean and deviation, or one sample.
    """
    return {
        "format": FORMAT,
        "encoders": dict(encoders),
        "resolution": resolution,
        "aspect_buckets": aspect_buckets,
        "crop": "center",
        "flips": flips,
        "posterior": posterior,
        "dtype": "float16",
    }


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """In words, where `found` is not what is wanted of it."""
    words = []
    for name, value in wanted.items():
        old = found.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            words += differences(old, value, f"{prefix}{name}.")
        elif old != value:
            words.append(f"{prefix}{name} was {_short(old)}, is {_short(value)}")
    return words


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"{len(value)} with digest {hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
    return text if len(text) <= 120 else f"{text[:117]}..."


def prompt_digest(prompt: str) -> int:
    """64 bits of a prompt, by which it is found."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big")


# -- names


def names_of(shards: Sequence[str]) -> list[str]:
    """A name for each shard in the cache: that of its file, with so many folders before it that all differ.

    Raises:
        ValueError: if a shard is there twice.
    """
    parts = [name_parts(shard) for shard in shards]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    if not parts:
        return []
    twice = next(shard for shard, part in zip(shards, parts, strict=True) if parts.count(part) > 1)
    raise UserValueError(f"{twice} is named twice. Name each shard once.")


def name_parts(shard: str) -> list[str]:
    """Folders and file name without suffix."""
    path = shard if is_url(shard) else Path(shard).resolve().as_posix()
    return [part for part in path.removesuffix(".tar").split("/") if part not in ("", ".", "..")]


def latents_file(name: str) -> str:
    """Of a shard of that name, in the cache."""
    return f"{name}.latents.safetensors"


def prompts_files(prompts: int) -> list[str]:
    """Of so many prompts, in the cache."""
    return [f"prompts-{number:05d}.safetensors" for number in range(math.ceil(prompts / PROMPTS_PER_FILE))]


# -- writing


def write_latents(path: Path, shard: CachedShard) -> None:
    """Write a shard's file, atomically."""
    save(path, {str(row): latents for row, latents in shard.latents.items()} | _tables(shard))


def _tables(shard: CachedShard) -> dict[str, Tensor]:
    return {"prompt": shard.prompt, "content": shard.content, "key": shard.key, "geometry": shard.time_ids}


def latents_bytes(samples: int, shapes: Mapping[int, Sequence[int]]) -> int:
    """Size of a shard's file, from the shapes of its latents by row."""
    empty = CachedShard(
        {},
        torch.empty(samples, dtype=torch.int32, device="meta"),
        torch.empty(samples, dtype=torch.int64, device="meta"),
        torch.empty(samples, dtype=torch.int64, device="meta"),
        torch.empty(samples, 2, 6, dtype=torch.int64, device="meta"),
    )
    latents = {str(row): torch.empty(*shape, dtype=torch.float16, device="meta") for row, shape in shapes.items()}
    return saved_bytes(latents | _tables(empty))


def write_prompts(path: Path, prompts: Sequence[str]) -> None:
    """Write the table of prompts, in the order of their ids, atomically."""
    digests = np.array([prompt_digest(prompt) for prompt in prompts], dtype=np.uint64)
    part = _part(path)
    pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string()), "digest": digests}), part, compression="zstd")
    _finish(part, path)


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that is either whole or not there; the same tensors give the same bytes."""
    part = _part(path)
    part.touch()
    mode = part.stat().st_mode  # of any new file here; safetensors would keep others from reading it
    save_file({name: value.contiguous() for name, value in tensors.items()}, part)
    part.chmod(mode)
    _finish(part, path)


def saved_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of the file that `save` would write, whose header says where each tensor is."""
    header, offset = {}, 0
    for name, value in tensors.items():
        end = offset + value.numel() * value.element_size()
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    return 8 + math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8 + offset


def _part(path: Path) -> Path:
    """Its name while it is written: always the same, so that what a killed run has left behind is overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.part")


def _finish(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
