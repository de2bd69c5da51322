"""Files of a cache: latents of each shard's pairs, conditioning of each prompt, and a fingerprint.

CACHE/fingerprint.json              encoders, resolution and further rules; each shard's name and number of samples
CACHE/00000.latents.safetensors     of 00000.tar: one tensor per sample, named by its position in the shard
CACHE/prompts.parquet               all distinct prompts, in the order of their ids; the empty prompt has id 0
CACHE/prompts-00000.safetensors     conditioning of the prompts with ids 0 to 1023, and so on

Numbers are float16. Each file is written atomically.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_align.common.files import atomic_path
from lit_align.data.shards.filesystems import is_url
from lit_align.user_errors import UserValueError

FORMAT = 1
FINGERPRINT, PROMPTS = "fingerprint.json", "prompts.parquet"
PROMPTS_PER_FILE = 1024
NAMES = {torch.float16: "F16", torch.int32: "I32", torch.int64: "I64"}  # names in safetensors headers

Flips = Literal["both", "none"]
Posterior = Literal["moments", "sample"]


class CachedShard(NamedTuple):
    """Cached tensors of a shard."""

    latents: dict[int, Tensor]  # by row: (flips, 2, moments, channels, h, w) float16, image 0 first, unmirrored first
    prompt: Tensor  # (samples,) int32 id; -1 if the sample is not a pair
    content: Tensor  # (samples,) int64: the bits of `content_digest`; 0 if the sample is not a pair
    key: Tensor  # (samples,) int64: the bits of `key_digest`; 0 if the sample is not a pair
    time_ids: Tensor  # (samples, 2, 6) int64, SDXL's sizes of both images, equal for both flips


def rules(
    encoders: Mapping[str, str], resolution: int, aspect_buckets: bool, flips: Flips, posterior: Posterior
) -> dict[str, Any]:
    """Part of the fingerprint that decides the numbers in a cache.

    Args:
        encoders: digests of their weights, see `Encoders.encoders_identity`.
        resolution: side of the square images, or of the square bucket; pixels.
        aspect_buckets: whether images keep their aspect ratio approximately.
        flips: whether mirrored images are encoded too.
        posterior: mean and standard deviation of the latents, or one sample.
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


def prompt_digest(prompt: str) -> int:
    """Digest of a prompt, 64 bits, by which the reader finds it."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big")


def names_of(shards: Sequence[str]) -> list[str]:
    """Name the shards in the cache: the file names, preceded by as many folders as make all names differ.

    Raises:
        ValueError: if a shard is named twice.
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
    """Folders and file name of a shard, without suffix."""
    path = shard if is_url(shard) else Path(shard).resolve().as_posix()
    return [part for part in path.removesuffix(".tar").split("/") if part not in ("", ".", "..")]


def latents_file(name: str) -> str:
    """File name of a shard's latents in the cache."""
    return f"{name}.latents.safetensors"


def prompts_files(prompts: int) -> list[str]:
    """File names of the conditioning of `prompts` prompts in the cache."""
    return [f"prompts-{number:05d}.safetensors" for number in range(math.ceil(prompts / PROMPTS_PER_FILE))]


def write_latents(path: Path, shard: CachedShard) -> None:
    """Write a shard's latents file, atomically."""
    save(path, {str(row): latents for row, latents in shard.latents.items()} | _tables(shard))


def _tables(shard: CachedShard) -> dict[str, Tensor]:
    return {"prompt": shard.prompt, "content": shard.content, "key": shard.key, "geometry": shard.time_ids}


def latents_bytes(samples: int, shapes: Mapping[int, Sequence[int]]) -> int:
    """Size of a shard's latents file, bytes, from the shapes of its latents by row."""
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
    table = pa.table({"prompt": pa.array(prompts, pa.string()), "digest": digests})
    with atomic_path(path, one_writer=True) as part:
        pq.write_table(table, part, compression="zstd")


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, atomically; equal tensors give equal bytes."""
    with atomic_path(path, one_writer=True) as part:
        part.touch()
        mode = part.stat().st_mode  # follows the umask; safetensors would make the file private
        save_file({name: value.contiguous() for name, value in tensors.items()}, part)
        part.chmod(mode)


def saved_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of the file that `save` would write, bytes, header included."""
    header, offset = {}, 0
    for name, value in tensors.items():
        end = offset + value.numel() * value.element_size()
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    return 8 + math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8 + offset
