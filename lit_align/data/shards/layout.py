"""How a sample lies in a shard: the layout of public preference shards.

KEY.jpg_0.jpg  KEY.jpg_1.png     two encoded images: JPEG, PNG or WebP, also under the name `jpg`
KEY.label_0.txt  KEY.label_1.txt 1 and 0, or 0 and 1: which image is preferred; 0.5 twice: a tie
KEY.caption.txt                  the prompt; KEY.original_prompt.txt is read too
"""

import io
import re
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from webdataset.tariterators import base_plus_ext

from lit_align.common.captions import clean_caption
from lit_align.data.shards.storage import open_binary
from lit_align.user_errors import UserValueError

PROMPT_FIELDS = ("caption.txt", "original_prompt.txt")
TEXTS = ("label_0.txt", "label_1.txt", *PROMPT_FIELDS)
DOTTED = re.compile(r"\.(jpg_[01](\.|$)|label_[01]\.txt$|caption\.txt$|original_prompt\.txt$)")  # a field with a front
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
LISTED = 8  # names of members in a message
BLOCK = 512  # bytes; the unit of a tar file
JPEG = b"\xff\xd8\xff"  # first bytes of a file


class SampleError(UserValueError):
    """A sample that is not a pair, or a shard that cannot be read; the message names shard and key."""


class Sample(NamedTuple):
    """Consecutive members of a shard with one key."""

    shard: str
    key: str
    fields: dict[str, bytes]  # by the member's name without the key
    repeated: tuple[str, ...]  # fields that occur more than once
    offset: int  # of its first byte in the shard
    size: int  # bytes, with headers and padding

    @property
    def location(self) -> str:
        return f"shard {self.shard}, key {self.key}"


class RawPair(NamedTuple):
    """A sample with its images still encoded."""

    shard: str
    key: str
    image_0: bytes
    image_1: bytes
    label_0: float  # 1 where image 0 is preferred, 0 where image 1 is, 0.5 for a tie
    prompt: str

    @property
    def location(self) -> str:
        return f"shard {self.shard}, key {self.key}"

    @property
    def human(self) -> int:
        """+1 where image 0 is preferred, -1 where image 1 is, 0 for a tie."""
        return round(2 * self.label_0 - 1)


def read_samples(shard: str, image_bytes: int | None = None, timeout: float | None = None) -> Iterator[Sample]:
    """Read the samples of a tar file in order.

    Args:
        shard: local path or URL.
        image_bytes: bytes to read of each image; None reads all members; else only texts are read whole.
            Of images whose size or orientation may stand behind the pixels, all but JPEG, all is read unless it is 0.
        timeout: seconds until a read is given up; None waits forever.

    Raises:
        SampleError: if the shard is missing, is not a tar file, or lacks a tar file's end: without this check a
            truncated shard would look like a shorter one.
    """
    try:
        with open_binary(shard, timeout) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            yield from _samples(tar, shard, image_bytes)
            _check_end(file, tar.offset, shard)
    except SampleError:
        raise
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        if shard.endswith(COMPRESSED):
            raise SampleError(f"shard {shard} is compressed, and pairs are read at their places. Unpack it.") from error
        raise SampleError(f"shard {shard} cannot be read: {error}. Restore the file or leave it out.") from error


def parse_bytes(shard: str, data: bytes) -> Sample:
    """Parse the bytes of one sample, cut out of a shard.

    Raises:
        SampleError: if they do not hold exactly one sample.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            samples = list(_samples(tar, shard, None))
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise SampleError(f"shard {shard} has changed: {error}") from error
    if len(samples) != 1 or samples[0].size != len(data):
        raise SampleError(f"shard {shard} has changed: there are other samples than before.")
    return samples[0]


def _samples(tar: tarfile.TarFile, shard: str, image_bytes: int | None) -> Iterator[Sample]:
    key, begin, fields, repeated = "", 0, dict[str, bytes](), list[str]()
    parts = dict[str, bool]()  # whether the sample of a key was whole
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # the list of headers would grow without bound
        name_key, field = base_plus_ext(member.name)
        if not member.isreg() or name_key is None:
            continue
        if name_key != key:
            if fields:
                parts[key] = _is_whole(fields)
                yield Sample(shard, key, fields, tuple(repeated), begin, member.offset - begin)
            if not parts.get(name_key, True):
                raise SampleError(
                    f"shard {shard}, key {name_key}: its members do not stand together. Write the shard again with all "
                    "members of a sample in a row, as tar --sort=name does."
                )
            key, begin, fields, repeated = name_key, member.offset, {}, []
        if field in fields:
            repeated.append(field)
        fields[field] = _read(tar, member, shard, _wanted(field, image_bytes))
    if fields:
        yield Sample(shard, key, fields, tuple(repeated), begin, tar.offset - begin)


def _wanted(field: str, image_bytes: int | None) -> int | None:
    """Bytes to read of a member; None for all."""
    if image_bytes is None or field in TEXTS:
        return None
    return image_bytes if field.startswith("jpg_") else 0


def _is_whole(fields: dict[str, bytes]) -> bool:
    """Whether a sample has the members of a pair."""
    images = {name.split(".")[0] for name in fields}
    return (
        {"jpg_0", "jpg_1"} <= images and set(TEXTS[:2]) <= set(fields) and any(map(fields.__contains__, PROMPT_FIELDS))
    )


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: str, at_most: int | None) -> bytes:
    file = tar.extractfile(member)
    wanted = member.size if at_most is None else min(at_most, member.size)
    data = b"" if file is None or wanted == 0 else file.read(wanted)
    if len(data) != wanted:
        raise SampleError(f"shard {shard} ends in the middle of {member.name}. Restore the file or leave it out.")
    if file is not None and 0 < wanted < member.size and not data.startswith(JPEG):
        data += file.read()
    return data


def _check_end(file: IO[bytes], offset: int, shard: str) -> None:
    """Refuse a tar file that does not end with two blocks of zeros, followed only by zeros."""
    file.seek(offset)
    rest = file.read(1 << 20)
    if len(rest) < 2 * BLOCK or rest.strip(b"\0"):
        raise SampleError(
            f"shard {shard} is truncated or damaged at byte {offset}: no tar header and no end of a tar file is there. "
            "Restore the file or leave it out."
        )


def parse_sample(sample: Sample) -> RawPair:
    """Parse a sample's fields into a pair.

    Raises:
        SampleError: if a field is missing or repeated, a label is not 0, 0.5 or 1, or the labels do not add up to 1.
    """
    location = sample.location
    _refuse_dots(sample)
    if sample.repeated:
        raise SampleError(f"{location}: field {sample.repeated[0]} is there more than once.")
    label_0, label_1 = (_parse_label(sample, f"label_{i}.txt") for i in (0, 1))
    if label_0 + label_1 != 1:
        raise SampleError(f"{location}: label_0 is {label_0:g} and label_1 is {label_1:g}; they must add up to 1.")
    images = [_image_field(sample, f"jpg_{i}") for i in (0, 1)]
    return RawPair(sample.shard, sample.key, images[0], images[1], label_0, _prompt(sample))


def _refuse_dots(sample: Sample) -> None:
    dotted = next((name for name in sample.fields if DOTTED.search(name)), None)
    if dotted is not None and not set(TEXTS[:2]) <= set(sample.fields):
        raise SampleError(
            f"shard {sample.shard}: {sample.key}.{dotted} has a dot in its key. A key ends at the first dot of a name, "
            "so different samples run together. Write the shard again with keys without dots."
        )


def _parse_label(sample: Sample, field: str) -> float:
    if field not in sample.fields:
        raise SampleError(f"{sample.location}: field {field} is missing; the sample has {_names(sample)}.")
    text = sample.fields[field].decode("utf-8", errors="replace").strip()
    if text not in ("0", "0.0", "0.5", "1", "1.0"):
        raise SampleError(f"{sample.location}: {field} is {text[:40]!r}; it must be 0, 0.5 or 1.")
    return float(text)


def _image_field(sample: Sample, prefix: str) -> bytes:
    fields = [name for name in sample.fields if name == prefix or name.startswith(f"{prefix}.")]
    if len(fields) != 1:
        found = "is missing" if not fields else f"is there {len(fields)} times"
        raise SampleError(f"{sample.location}: image {prefix}.* {found}; the sample has {_names(sample)}.")
    return sample.fields[fields[0]]


def _prompt(sample: Sample) -> str:
    for field in PROMPT_FIELDS:
        if field in sample.fields:
            try:
                return clean_caption(sample.fields[field].decode("utf-8"))
            except UnicodeDecodeError as error:
                raise SampleError(f"{sample.location}: {field} is not UTF-8 text: {error}.") from error
    raise SampleError(f"{sample.location}: no prompt, neither {' nor '.join(PROMPT_FIELDS)}; it has {_names(sample)}.")


def _names(sample: Sample) -> str:
    names = sorted(sample.fields)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more if names else "no field"
