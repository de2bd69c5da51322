"""Files that `from_pretrained` loads for a model or a tokenizer, and digests that identify them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_align.common.hub import ModelLocation
from lit_align.user_errors import UserFileNotFoundError

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
INCIDENTAL = ("transformers_version", "dtype", "torch_dtype")  # config keys about the saving, not about the model


def weight_files(location: ModelLocation, stem: str, download: bool = True) -> list[Path]:
    """List a model's config and the weight files that `from_pretrained` would load.

    Args:
        location: of the model.
        stem: name of the weight files without suffix, such as `diffusion_pytorch_model`.
        download: whether missing files are downloaded.

    Raises:
        FileNotFoundError: if config or weights are missing.
    """
    variant = f".{location.variant}" if location.variant else ""
    pickled = "pytorch_model" if stem == "model" else stem  # transformers' older name for pickled weights
    names = [f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json", f"{pickled}{variant}.bin"]
    found = next((path for path in (location.find(name, download) for name in names) if path is not None), None)
    config = location.find("config.json", download)
    if config is None or found is None:
        raise location.missing("config.json" if config is None else names[0])
    if found.suffix != ".json":
        return [config, found]
    shards = sorted(set(json.loads(found.read_text())["weight_map"].values()))
    files = [path for path in (location.find(shard, download) for shard in shards) if path is not None]
    if len(files) != len(shards):
        raise UserFileNotFoundError(f"{location}: {found.name} lists {len(shards)} files, but only {len(files)} exist.")
    return [config, *files]


def digest_weights(location: ModelLocation, stem: str) -> str:
    """Digest a model's config and weight files to 24 hexadecimal digits; see `weight_files`.

    Raises:
        FileNotFoundError: if config or weights are missing.
    """
    config, *files = weight_files(location, stem)
    digest = hashlib.blake2b(_config_bytes(config), digest_size=12)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def digest_tokenizer(location: ModelLocation) -> str:
    """Digest a tokenizer's files to 24 hexadecimal digits.

    Raises:
        FileNotFoundError: if there are none.
    """
    digest = hashlib.blake2b(digest_size=12)
    found = {name: path for name in TOKENIZER_FILES if (path := location.find(name)) is not None}
    if not found:
        raise location.missing(TOKENIZER_FILES[0])
    for name, path in found.items():
        content = _config_bytes(path) if name == "tokenizer_config.json" else path.read_bytes()
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _config_bytes(path: Path) -> bytes:
    return json.dumps(without_incidental(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True).encode()


def without_incidental(config: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the keys of a config that describe how it was saved, not the model."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in INCIDENTAL}
