"""All files of a folder of images: images and captions by name, and what is neither, with a reason for each."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lit_align.data.shards.writer import image_suffix

READ = ".jpg .jpeg .jpe .jif .jfif .pjpeg .pjp .png .apng .webp .avif .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm"
NOT_READ = ".heic .heif .hif .jxl .jp2 .j2k .jpx .tga .psd .svg .ico .exr .hdr .dng .cr2 .cr3 .nef .arw .raf .orf .rw2"
IMAGES = frozenset(f"{READ} {NOT_READ}".split())  # what is not read is named when it cannot be decoded
CAPTION = ".txt"
SYSTEM = {
    ".DS_Store",
    ".ipynb_checkpoints",
    "@eaDir",
    "Thumbs.db",
    "desktop.ini",
}  # programs put them anywhere
HEADER_BYTES = 16  # enough to recognise an image without a suffix


class LeftOut(NamedTuple):
    """A file or folder that cannot be part of a pair."""

    place: str  # such as chosen/notes.md
    reason: str


class FolderFiles(NamedTuple):
    """Files of a folder and its subfolders, by name: the path in the folder, without suffix."""

    images: dict[str, tuple[str, ...]]  # paths in the folder
    captions: dict[str, tuple[str, ...]]  # whole paths
    left_out: list[LeftOut]


def list_files(folder: Path, role: str) -> FolderFiles:
    """List a folder and its subfolders, also those behind links.

    Args:
        folder: to be listed.
        role: `chosen`, `rejected` or `captions`, in front of the places of what is left out.
    """
    found = FolderFiles({}, {}, [])
    for path, reason in _walk(folder, "", (os.path.realpath(folder),)):
        stem, suffix = os.path.splitext(path)
        if reason:
            found.left_out.append(LeftOut(f"{role}/{path}", reason))
        elif suffix.lower() == CAPTION:
            found.captions[stem] = (*found.captions.get(stem, ()), str(folder / path))
        elif suffix.lower() in IMAGES:
            found.images[stem] = (*found.images.get(stem, ()), path)
        elif _begins_like_image(folder / path):
            found.images[path] = (*found.images.get(path, ()), path)
        else:
            found.left_out.append(LeftOut(f"{role}/{path}", "file is neither an image nor a caption"))
    return found


def _walk(folder: Path, relative: str, above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the path of each file in alphabetical order, with a reason where it cannot be read.

    Args:
        folder: to be walked.
        relative: prefix of the paths, with a slash, or empty.
        above: real paths of the folder and of those around it.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name not in SYSTEM)
    except OSError as error:
        yield relative, f"folder cannot be read: {error.strerror}"
        return
    for name in names:
        path, place = folder / name, f"{relative}{name}"
        if name.startswith("."):
            yield place, "hidden file or folder"
        elif os.path.isdir(path):
            real = os.path.realpath(path)
            if real in above:
                yield place, "link to a folder that it is in"
            elif os.path.islink(path) and real.startswith(f"{above[0]}{os.sep}"):
                yield place, "link to a folder that is read by its own name"
            else:
                yield from _walk(path, f"{place}/", (*above, real))
        elif os.path.isfile(path):
            yield place, ""
        else:
            yield place, "link to nothing" if os.path.islink(path) else "not a file"


def _begins_like_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return image_suffix(file.read(HEADER_BYTES)) != "bin"
    except OSError:
        return False
