"""Import a folder of chosen and a folder of rejected images with equal names, and captions beside them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.data.importers.rejects import Reject, Rejected
from lit_align.data.importers.source import convert_row, load_image, new_pair, shuffle_images
from lit_align.data.shards.writer import NewPair
from lit_align.user_errors import UserFileNotFoundError, UserValueError

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"}


class NamedFiles(NamedTuple):
    """Files of one name, each path relative to its folder."""

    name: str  # without suffix
    chosen: tuple[str, ...]  # more than one, or none, is an error
    rejected: tuple[str, ...]
    caption: str | None  # full path


@dataclass(frozen=True)
class FoldersPart:
    """Names of two folders that become one shard."""

    begin: int
    names: tuple[NamedFiles, ...]
    chosen: Path
    rejected: Path
    remote: bool = False

    def pairs_and_rejects(self) -> Iterator[NewPair | Reject]:
        for row, name in enumerate(self.names, self.begin):
            yield convert_row(row, name.name, partial(self._pair, name))

    def _pair(self, files: NamedFiles, key: str) -> NewPair:
        for folder, found in ((self.chosen, files.chosen), (self.rejected, files.rejected)):
            if len(found) != 1:
                reason = "two images of the same name" if found else "image missing"
                raise Rejected(reason, f"{folder} has {' and '.join(found) or 'none'}")
        if files.caption is None:
            raise Rejected("prompt missing", f"there is no {files.name}.txt")
        chosen, rejected = self.chosen / files.chosen[0], self.rejected / files.rejected[0]
        label_0, paths = shuffle_images(key, [str(chosen), str(rejected)])
        try:
            prompt = Path(files.caption).read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise Rejected("prompt is not text", f"{files.caption}: {error}") from error
        return new_pair(key, (load_image(paths[0]), load_image(paths[1])), label_0, prompt, {"name": files.name})


@dataclass(frozen=True)
class Folders:
    """All names of two folders, in alphabetical order."""

    names: list[NamedFiles]
    chosen: Path
    rejected: Path
    digest: str  # of the names, not of the files' contents
    name: str = "folder"
    bytes: None = None

    @property
    def rows(self) -> int:
        return len(self.names)

    def describe(self) -> dict[str, Any]:
        return {"files": [{"name": "chosen and rejected", "sha256": self.digest}], "options": {}}

    def part(self, begin: int, end: int) -> FoldersPart:
        return FoldersPart(begin, tuple(self.names[begin:end]), self.chosen, self.rejected)


def open_folders(chosen: Path, rejected: Path, captions: Path | None) -> Folders:
    """Find the pairs of two folders and their subfolders.

    Args:
        chosen: folder of the preferred images.
        rejected: folder of the other images, with equal names; the suffixes may differ.
        captions: folder of `NAME.txt`; None looks beside the chosen images, then beside the rejected ones.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if one folder lies in the other.
    """
    for option, folder in (("chosen", chosen), ("rejected", rejected), ("captions", captions)):
        if folder is not None and not folder.is_dir():
            raise UserFileNotFoundError(f"{option}: there is no folder {folder}.")
    inner, outer = chosen.resolve(), rejected.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserValueError(f"chosen: {chosen} and rejected: {rejected} must lie side by side, not one in the other.")
    images = [_images(folder) for folder in (chosen, rejected)]
    texts = _captions((chosen, rejected) if captions is None else (captions,))
    names = [
        NamedFiles(name, images[0].get(name, ()), images[1].get(name, ()), texts.get(name))
        for name in sorted(images[0].keys() | images[1].keys())
    ]
    return Folders(names, chosen, rejected, _digest(names))


def _captions(folders: tuple[Path, ...]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.txt")):
            texts.setdefault(path.relative_to(folder).with_suffix("").as_posix(), str(path))
    return texts


def _images(folder: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGES and not path.name.startswith("."):
            relative = path.relative_to(folder)
            name = relative.with_suffix("").as_posix()
            found[name] = (*found.get(name, ()), relative.as_posix())
    return found


def _digest(names: list[NamedFiles]) -> str:
    listed = [[name.name, name.chosen, name.rejected, int(name.caption is not None)] for name in names]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
