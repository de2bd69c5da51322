"""The layout of a sample in a shard, as public preference shards have it.

KEY.jpg_0.jpg  KEY.jpg_1.png     two encoded images: JPEG, PNG or WebP, whatever `jpg` says
KEY.label_0.txt  KEY.label_1.txt 1 and 0, or 0 and 1: which image is preferred; 0.5 twice: a tie
KEY.caption.txt                  the prompt; KEY.original_prompt.txt is read too
"""

import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from webdataset.tariterators import group_by_keys

PROMPT_FIELDS = ("caption.txt", "original_prompt.txt")


class SampleError(ValueError):
    """A sample that cannot become a pair; the message names shard and key."""


class RawPair(NamedTuple):
    """A sample with its images still encoded."""

    shard: str
    key: str
    image_0: bytes
    image_1: bytes
    label_0: float  # 1 where image 0 is preferred, 0 where image 1 is, 0.5 for a tie
    prompt: str

    @property
    def place(self) -> str:
        return f"shard {self.shard}, key {self.key}"


def read_samples(shard: str, with_images: bool = True) -> Iterator[dict[str, Any]]:
    """The samples of a tar file in its order: fields by name, `__key__` and `__url__`.

    Without images their fields are there but empty, and the disk only has to seek over them.

    Raises:
        SampleError: if the shard is missing, is not a tar file, is cut off or has a field twice.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            yield from group_by_keys(_members(tar, shard, with_images))
    except (OSError, tarfile.TarError, EOFError) as error:
        raise SampleError(f"shard {shard} cannot be read: {error}. Restore the file or leave it out.") from error
    except ValueError as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError(f"shard {shard} holds a field twice: {error.args[0]}.") from error


def _members(tar: tarfile.TarFile, shard: str, with_images: bool) -> Iterator[dict[str, Any]]:
    for member in tar:
        if not member.isreg():
            continue
        is_image = ".jpg_" in member.name.rsplit("/", 1)[-1]
        file = tar.extractfile(member) if with_images or not is_image else None
        data = file.read() if file is not None else b""
        if file is not None and len(data) != member.size:
            raise SampleError(f"shard {shard} ends in the middle of {member.name}. Restore the file or leave it out.")
        yield {"fname": member.name, "data": data, "__url__": shard}
        tar.members = []  # type: ignore[attr-defined]  # else a tar keeps every header it has seen


def parse_sample(sample: dict[str, Any]) -> RawPair:
    """A sample's fields as a pair.

    Raises:
        SampleError: if a field is missing or a label is not 0, 0.5 or 1 with both adding up to 1.
    """
    shard, key = sample["__url__"], sample["__key__"]
    place = f"shard {shard}, key {key}"
    label_0, label_1 = (_parse_label(sample, f"label_{i}.txt", place) for i in (0, 1))
    if label_0 + label_1 != 1:
        raise SampleError(f"{place}: label_0 is {label_0:g} and label_1 is {label_1:g}; they must add up to 1.")
    images = [_image_field(sample, f"jpg_{i}", place) for i in (0, 1)]
    return RawPair(shard, key, images[0], images[1], label_0, _prompt(sample, place))


def _parse_label(sample: dict[str, Any], field: str, place: str) -> float:
    if field not in sample:
        raise SampleError(f"{place}: field {field} is missing; the sample has {_fields(sample)}.")
    text = sample[field].decode("utf-8", errors="replace").strip()
    if text not in ("0", "0.0", "0.5", "1", "1.0"):
        raise SampleError(f"{place}: {field} is {text[:40]!r}; it must be 0, 0.5 or 1.")
    return float(text)


def _image_field(sample: dict[str, Any], prefix: str, place: str) -> bytes:
    fields = [name for name in sample if name == prefix or name.startswith(f"{prefix}.")]
    if len(fields) != 1:
        found = "is missing" if not fields else f"is there {len(fields)} times"
        raise SampleError(f"{place}: image {prefix}.* {found}; the sample has {_fields(sample)}.")
    data: bytes = sample[fields[0]]
    return data


def _prompt(sample: dict[str, Any], place: str) -> str:
    for field in PROMPT_FIELDS:
        if field in sample:
            try:
                text: str = sample[field].decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise SampleError(f"{place}: {field} is not UTF-8 text: {error}.") from error
            return text
    raise SampleError(f"{place}: no prompt, neither {' nor '.join(PROMPT_FIELDS)}; the sample has {_fields(sample)}.")


def _fields(sample: dict[str, Any]) -> str:
    return ", ".join(sorted(name for name in sample if not name.startswith("__"))) or "no field"
