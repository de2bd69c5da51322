"""Import a folder of chosen and a folder of rejected images with equal names, and captions beside them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.data.importers.folder_files import CAPTION, FolderFiles, LeftOut, list_files
from lit_align.data.importers.rejects import Reject, Rejected
from lit_align.data.importers.source import convert_row, load_image, new_pair, shuffle_images
from lit_align.data.shards.writer import NewPair
from lit_align.user_errors import UserFileNotFoundError, UserValueError


class NamedFiles(NamedTuple):
    """Files of one name, each path relative to its folder."""

    name: str  # without suffix
    chosen: tuple[str, ...]  # more than one, or none, is an error
    rejected: tuple[str, ...]
    captions: tuple[str, ...]  # whole paths; more than one, or none, is an error


@dataclass(frozen=True)
class FoldersPart:
    """Names of two folders that become one shard, and what is left out."""

    begin: int
    names: tuple[NamedFiles | LeftOut, ...]
    chosen: Path
    rejected: Path
    remote: bool = False

    def pairs_and_rejects(self) -> Iterator[NewPair | Reject]:
        for row, one in enumerate(self.names, self.begin):
            place = one.place if isinstance(one, LeftOut) else one.name
            yield convert_row(row, place, partial(self._pair, one))

    def _pair(self, files: NamedFiles | LeftOut, key: str) -> NewPair:
        if isinstance(files, LeftOut):
            raise Rejected(files.reason)
        for folder, found in ((self.chosen, files.chosen), (self.rejected, files.rejected)):
            if len(found) != 1:
                reason = "two images of the same name" if found else "image missing"
                raise Rejected(reason, f"{folder} has {' and '.join(found) or 'none'}")
        if len(files.captions) != 1:
            reason = "two captions of the same name" if files.captions else "prompt missing"
            raise Rejected(reason, " and ".join(files.captions) or f"there is no {files.name}{CAPTION}")
        chosen, rejected = self.chosen / files.chosen[0], self.rejected / files.rejected[0]
        label_0, paths = shuffle_images(key, [str(chosen), str(rejected)])
        prompt = _read_caption(files.captions[0])
        return new_pair(key, (load_image(paths[0]), load_image(paths[1])), label_0, prompt, {"name": files.name})


def _read_caption(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Rejected("prompt is not text", f"{path}: {error}") from error
    except (FileNotFoundError, PermissionError) as error:
        raise Rejected("prompt missing", f"{path}: {error.strerror}") from error


@dataclass(frozen=True)
class Folders:
    """All names of two folders, in alphabetical order, and then what is left out."""

    names: list[NamedFiles | LeftOut]
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
    """Find the pairs of two folders and their subfolders, linked ones too; what is no pair is a row that is left out.

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
    if _overlap(chosen, rejected):
        raise UserValueError(f"chosen: {chosen} and rejected: {rejected} must lie side by side, not one in the other.")
    good, bad = list_files(chosen, "chosen"), list_files(rejected, "rejected")
    texts, left_out = bad.captions | good.captions, [*good.left_out, *bad.left_out]
    if captions is not None:
        apart = not any(_overlap(captions, one) for one in (chosen, rejected))
        texts, more = _captions(captions, apart)
        left_out += [*more, *(_unused("chosen", good) + _unused("rejected", bad) if apart else [])]
    names = [
        NamedFiles(name, good.images.get(name, ()), bad.images.get(name, ()), texts.get(name, ()))
        for name in sorted(good.images.keys() | bad.images.keys())
    ]
    alone = sorted(texts.keys() - {one.name for one in names})
    left_out += [LeftOut(f"{name}{CAPTION}", "caption without images") for name in alone]
    return Folders([*names, *left_out], chosen, rejected, _digest(names, left_out))


def _captions(folder: Path, apart: bool) -> tuple[dict[str, tuple[str, ...]], list[LeftOut]]:
    """List a folder of captions; what else is there counts as left out if the folder is `apart` from the images."""
    found = list_files(folder, "captions")
    images = [LeftOut(f"captions/{path}", "image among captions") for paths in found.images.values() for path in paths]
    return found.captions, [*found.left_out, *images] if apart else []


def _unused(role: str, found: FolderFiles) -> list[LeftOut]:
    return [LeftOut(f"{role}/{name}{CAPTION}", "caption beside images, not in captions") for name in found.captions]


def _overlap(one: Path, other: Path) -> bool:
    return one.resolve().is_relative_to(other.resolve()) or other.resolve().is_relative_to(one.resolve())


def _digest(names: list[NamedFiles], left_out: list[LeftOut]) -> str:
    listed: list[Any] = [[name.name, name.chosen, name.rejected, len(name.captions)] for name in names]
    return hashlib.sha256(json.dumps([*listed, *left_out]).encode()).hexdigest()
