"""Where a part of a pipeline loads from, and which files those are."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from lit_align.user_errors import UserFileNotFoundError

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
INCIDENTAL = ("transformers_version", "dtype", "torch_dtype")  # in a config: by whom it was saved, not what it is


class Source(NamedTuple):
    """What `from_pretrained` is told."""

    repo: str  # hub id or local folder
    folder: str = ""  # in it
    revision: str | None = None
    variant: str | None = None

    @property
    def place(self) -> dict[str, Any]:
        """The arguments that say where a config is."""
        return {"subfolder": self.folder or None, "revision": self.revision}

    @property
    def local(self) -> bool:
        """Whether it is a folder, not a hub id."""
        return Path(self.repo).is_dir()

    def find(self, name: str, download: bool = True) -> Path | None:
        """A file of it, from the hub if it is not here and `download`; None where there is none."""
        if self.local:
            path = Path(self.repo) / self.folder / name
            return path if path.is_file() else None
        where, revision, here = self.folder or None, self.revision, not download
        try:
            return Path(hf_hub_download(self.repo, name, subfolder=where, revision=revision, local_files_only=here))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None

    def __str__(self) -> str:
        return "/".join(part for part in (self.repo, self.folder) if part)


def weight_files(source: Source, stem: str, download: bool = True) -> list[Path]:
    """The config of a model and the weight files that `from_pretrained` would load.

    Args:
        source: of the model.
        stem: name of its weights without suffix, such as `diffusion_pytorch_model`.
        download: get from the hub what is not here.

    Raises:
        FileNotFoundError: if config or weights are missing.
    """
    variant = f".{source.variant}" if source.variant else ""
    old = "pytorch_model" if stem == "model" else stem  # transformers named its pickles otherwise
    names = [f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json", f"{old}{variant}.bin"]
    found = next((path for path in (source.find(name, download) for name in names) if path is not None), None)
    config = source.find("config.json", download)
    if config is None or found is None:
        missing = "config.json" if config is None else names[0]
        raise UserFileNotFoundError(f"{source} holds no {missing}, or no copy of it is here. Check model.backbone.")
    if found.suffix != ".json":
        return [config, found]
    shards = sorted(set(json.loads(found.read_text())["weight_map"].values()))
    files = [path for path in (source.find(shard, download) for shard in shards) if path is not None]
    if len(files) != len(shards):
        raise UserFileNotFoundError(f"{source}: of the {len(shards)} files that {found.name} names, some are missing.")
    return [config, *files]


def digest_weights(source: Source, stem: str) -> str:
    """24 hexadecimal digits of a model's config and weight files, see `weight_files`.

    Raises:
        FileNotFoundError: if config or weights are missing.
    """
    config, *files = weight_files(source, stem)
    digest = hashlib.blake2b(_plain_config(config), digest_size=12)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def digest_tokenizer(source: Source) -> str:
    """24 hexadecimal digits of a tokenizer's files.

    Raises:
        FileNotFoundError: if there are none.
    """
    digest = hashlib.blake2b(digest_size=12)
    found = {name: path for name in TOKENIZER_FILES if (path := source.find(name)) is not None}
    if not found:
        raise UserFileNotFoundError(f"{source} holds no tokenizer, or no copy of it is here. Check model.backbone.")
    for name, path in found.items():
        content = _plain_config(path) if name == "tokenizer_config.json" else path.read_bytes()
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _plain_config(path: Path) -> bytes:
    return json.dumps(plain(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True).encode()


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what only says by whom it was saved."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in INCIDENTAL}
