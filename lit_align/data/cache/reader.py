"""Read single samples of a cache, memory-mapped; see `cache.format` for its files."""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_align.common.manifest import differences, in_words
from lit_align.data.cache.format import (
    FINGERPRINT,
    FORMAT,
    PROMPTS,
    PROMPTS_PER_FILE,
    latents_file,
    name_parts,
    prompt_digest,
    prompts_files,
)
from lit_align.data.shards.layout import SampleError
from lit_align.user_errors import UserFileNotFoundError, UserValueError

TABLES = ("prompt", "content", "key", "geometry")  # tensors that cover all samples of a shard
OPEN_FILES = 256  # limit per process; open files are only mapped into memory


class _OpenFile(NamedTuple):
    """An open safetensors file, and its small tensors."""

    file: Any
    tables: dict[str, Tensor]


class Cache:
    """A cache that `lit-align encode` has written. It can be pickled; each process opens its own files.

    Args:
        folder: of the cache.
        fingerprint: content of its `fingerprint.json`.
        prompts: in the order of their ids.
        digests: (prompts,) `prompt_digest` of each.
    """

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, Any], prompts: pa.Array, digests: NDArray[np.uint64]
    ) -> None:
        self.folder, self.fingerprint, self.prompts = folder, fingerprint, prompts
        self.moments = 2 if fingerprint["posterior"] == "moments" else 1
        self._order = np.argsort(digests, kind="stable")
        self._digests = digests[self._order]
        self._shards = {shard["name"] for shard in fingerprint["shards"]}
        self._names: dict[str, str | None] = {}  # in the cache, by path of the shard; None if not cached
        self._opened: OrderedDict[str, _OpenFile] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a finished cache.

        Raises:
            FileNotFoundError: if there is no cache.
            ValueError: if it is unfinished, or of another version.
        """
        folder = Path(folder)
        again = "Run lit-align encode again with the same options to resume it."
        if not (folder / FINGERPRINT).is_file():
            raise UserFileNotFoundError(
                f"{folder} is not a cache: it has no {FINGERPRINT}. Make one with lit-align encode."
            )
        fingerprint = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8"))
        if fingerprint.get("format") != FORMAT:
            raise UserValueError(
                f"{folder} is a cache of format {fingerprint.get('format')}, and this version of lit-align reads "
                f"{FORMAT}. Encode again into another folder."
            )
        wanted = [latents_file(shard["name"]) for shard in fingerprint["shards"]]
        wanted += [PROMPTS, *prompts_files(fingerprint["prompts"]["count"])]
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            raise UserValueError(
                f"{folder}: {len(missing)} of {len(wanted)} files are missing, first {missing[0]}. {again}"
            )
        table = pq.read_table(folder / PROMPTS)
        return cls(folder, fingerprint, table["prompt"].combine_chunks(), table["digest"].to_numpy())

    def check(self, expected: Mapping[str, Any]) -> None:
        """Refuse a cache that does not fit a run.

        Args:
            expected: entries that its fingerprint must have, see `rules`.

        Raises:
            ValueError: naming all differences.
        """
        known = {name: self.fingerprint.get(name) for name in expected}
        if changed := differences(known, expected):
            raise UserValueError(
                f"{self.folder} does not fit this run: {in_words(changed)}. Encode into another folder with this "
                "run's config (lit-align encode --config ... --output ...), or go back to the old values."
            )

    def has(self, shard: str) -> bool:
        """Whether a shard was encoded; its folder may have changed since."""
        return self._name(shard) is not None

    def _name(self, shard: str) -> str | None:
        if shard not in self._names:
            parts = name_parts(shard)
            names = ["/".join(parts[-depth:]) for depth in range(1, len(parts) + 1)]
            self._names[shard] = next((name for name in names if name in self._shards), None)
        return self._names[shard]

    def latents(self, shard: str, row: int, flipped: bool) -> Tensor:
        """Read the moments of both images of a pair, (2, moments, channels, h, w) float16, image 0 first.

        Args:
            shard: path or URL.
            row: position of the sample among all samples of the shard.
            flipped: whether both images are mirrored.

        Raises:
            SampleError: if the sample was broken when the shard was encoded.
            ValueError: if mirrored images were not encoded.
        """
        opened = self._shard(shard)
        if row >= len(opened.tables["prompt"]) or opened.tables["prompt"][row] < 0:
            raise SampleError(
                f"shard {shard}, sample {row}: {self.folder} has no latents of it: it was broken when the shard "
                "was encoded. Leave it out with data.on_error skip, or repair the shard and encode it again."
            )
        if flipped and self.fingerprint["flips"] != "both":
            raise UserValueError(
                f"{self.folder} has no mirrored images. Set data.flip_probability to 0, or encode --flips both."
            )
        latents: Tensor = opened.file.get_slice(str(row))[int(flipped)]
        return latents

    def latents_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape (moments, channels, h, w) of the latents of an image of `height` and `width` pixels."""
        for shard in self._shards:
            opened = self._open(latents_file(shard), TABLES)
            for row in (opened.tables["prompt"] >= 0).nonzero().flatten().tolist()[:1]:
                *_, moments, channels, h, _ = opened.file.get_slice(str(row)).get_shape()
                factor = int(opened.tables["geometry"][row, 0, 4]) // h
                return moments, channels, height // factor, width // factor
        raise UserValueError(f"{self.folder} holds no pair.")

    def time_ids(self, shard: str, row: int) -> Tensor:
        """SDXL's time ids of both images of a pair, (2, 6) int64."""
        return self._shard(shard).tables["geometry"][row]

    def content(self, shard: str, row: int) -> str:
        """`content_digest` of the encoded pair."""
        return f"{int(self._shard(shard).tables['content'][row]) % 2**64:016x}"

    def key(self, shard: str, row: int) -> int:
        """`key_digest` of the encoded sample."""
        return int(self._shard(shard).tables["key"][row]) % 2**64

    def prompt(self, shard: str, row: int) -> str:
        """Prompt of a pair."""
        prompt: str = self.prompts[int(self._shard(shard).tables["prompt"][row])].as_py()
        return prompt

    def _shard(self, shard: str) -> _OpenFile:
        name = self._name(shard)
        if name is None:
            raise SampleError(f"shard {shard} is not in the cache {self.folder}. Encode it, or leave it out.")
        return self._open(latents_file(name), TABLES)

    def conditioning(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Read the text encoders' outputs for the prompts, (prompts, ...) float16 each.

        Raises:
            SampleError: if a prompt was not encoded.
        """
        rows: dict[str, list[Tensor]] = {}
        for prompt in prompts:
            number, row = divmod(self._id(prompt), PROMPTS_PER_FILE)
            file = self._open(f"prompts-{number:05d}.safetensors", ()).file
            for key in file.keys():  # noqa: SIM118  # not a dict
                rows.setdefault(key, []).append(file.get_slice(key)[row])
        return {key: torch.stack(values) for key, values in rows.items()}

    def _id(self, prompt: str) -> int:
        position = int(np.searchsorted(self._digests, np.uint64(prompt_digest(prompt))))
        found = int(self._order[position]) if position < len(self._order) else 0
        if self.prompts[found].as_py() != prompt:
            raise SampleError(
                f"{self.folder} lacks the prompt {prompt[:80]!r}: it has changed. Encode the shards again."
            )
        return found

    def _open(self, name: str, tables: Sequence[str]) -> _OpenFile:
        if name not in self._opened:
            try:
                file = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise SampleError(
                    f"{self.folder / name} cannot be read: {error}. Delete it and encode again."
                ) from error
            self._opened[name] = _OpenFile(file, {table: file.get_tensor(table) for table in tables})
            if len(self._opened) > OPEN_FILES:
                self._opened.popitem(last=False)
        self._opened.move_to_end(name)
        return self._opened[name]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": OrderedDict()}
