"""Pairs of one's own: a folder of chosen and one of rejected images of the same names, with captions beside them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.data.importers.source import Reject, Rejected, load_image, new_pair, outcome
from lit_align.data.importers.table import shuffled
from lit_align.data.shards.writer import NewPair
from lit_align.user_errors import UserFileNotFoundError, UserValueError

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"}


class Name(NamedTuple):
    """What the folders have of one name, paths relative to them."""

    name: str  # without its ending
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    captions: tuple[str, ...]  # the whole path of the first that is there


@dataclass(frozen=True)
class FoldersPart:
    """Some of the names."""

    begin: int
    names: tuple[Name, ...]
    chosen: Path
    rejected: Path
    remote: bool = False

    def outcomes(self) -> Iterator[NewPair | Reject]:
        for row, name in enumerate(self.names, self.begin):
            yield outcome(row, name.name, partial(self._pair, name))

    def _pair(self, name: Name, key: str) -> NewPair:
        for folder, there in ((self.chosen, name.chosen), (self.rejected, name.rejected)):
            if len(there) != 1:
                reason = "two images of the same name" if there else "image missing"
                raise Rejected(reason, f"{folder} has {' and '.join(there) or 'none'}")
        if not name.captions:
            raise Rejected("prompt missing", f"there is no {name.name}.txt")
        label_0, files = shuffled(key, [str(self.chosen / name.chosen[0]), str(self.rejected / name.rejected[0])])
        try:
            prompt = Path(name.captions[0]).read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise Rejected("prompt is not text", f"{name.captions[0]}: {error}") from error
        return new_pair(key, (load_image(files[0]), load_image(files[1])), label_0, prompt, {"name": name.name})


@dataclass(frozen=True)
class Folders:
    """All names of two folders, in alphabetical order."""

    names: list[Name]
    chosen: Path
    rejected: Path
    digest: str  # of names, files and captions
    name: str = "folder"
    bytes: None = None

    @property
    def rows(self) -> int:
        return len(self.names)

    def about(self) -> dict[str, Any]:
        return {"files": [{"name": "chosen and rejected", "sha256": self.digest}], "options": {}}

    def part(self, begin: int, end: int) -> FoldersPart:
        return FoldersPart(begin, tuple(self.names[begin:end]), self.chosen, self.rejected)


def open_folders(chosen: Path, rejected: Path, captions: Path | None) -> Folders:
    """The pairs of two folders and the folders in them.

    Args:
        chosen: preferred images.
        rejected: the others, of the same names; the endings may differ.
        captions: folder of `NAME.txt`; none: they are beside the chosen images, else beside the rejected ones.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if one folder is in the other.
    """
    for option, folder in (("chosen", chosen), ("rejected", rejected), ("captions", captions)):
        if folder is not None and not folder.is_dir():
            raise UserFileNotFoundError(f"{option}: there is no folder {folder}.")
    inner, outer = chosen.resolve(), rejected.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserValueError(f"chosen: {chosen} and rejected: {rejected} must lie side by side, not one in the other.")
    images = [_images(folder) for folder in (chosen, rejected)]
    places = (chosen, rejected) if captions is None else (captions,)
    texts: dict[str, str] = {}
    for place in places:
        for path in sorted(place.rglob("*.txt")):
            texts.setdefault(path.relative_to(place).with_suffix("").as_posix(), str(path))
    names = [
        Name(name, images[0].get(name, ()), images[1].get(name, ()), (texts[name],) if name in texts else ())
        for name in sorted(images[0].keys() | images[1].keys())
    ]
    return Folders(names, chosen, rejected, _digest(names))


def _images(folder: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGES and not path.name.startswith("."):
            relative = path.relative_to(folder)
            name = relative.with_suffix("").as_posix()
            found[name] = (*found.get(name, ()), relative.as_posix())
    return found


def _digest(names: list[Name]) -> str:
    """Images and captions are not read for it: there may be many."""
    listed = [[name.name, name.chosen, name.rejected, len(name.captions)] for name in names]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
