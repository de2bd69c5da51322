"""Columns of a table: which hold the two images, the preference and the prompt, found by their names or named."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from lit_align.user_errors import UserValueError

IMAGE_WORDS = {
    *("image", "images", "img", "jpg", "jpeg", "png", "picture", "photo"),
    *("path", "url", "uri", "file", "filename", "name", "bytes", "data", "src"),
}
OPPOSITES = (
    ("chosen", "rejected"), ("preferred", "rejected"), ("preferred", "dispreferred"), ("preferred", "unpreferred"),
    ("winner", "loser"), ("winning", "losing"), ("win", "lose"), ("win", "loss"), ("won", "lost"),
    ("better", "worse"), ("good", "bad"), ("positive", "negative"), ("pos", "neg"), ("w", "l"),
)  # fmt: skip
BARE = ("chosen", "preferred", "winner")  # names of images without a word that says so
SIDES = (("0", "1"), ("1", "2"), ("a", "b"), ("left", "right"), ("first", "second"))
LABELS = ("label", "labels", "preference", "human_preference")  # 1 prefers image 0
INDEXES = ("winner", "choice", "preferred", "better", "best", "vote", "preferred_image", "chosen_image", "best_image")
JUDGING = {*LABELS, *INDEXES, "preferences", "pref", "prefer", "votes", "choices", "winning", "chosen", "rank", "ranks"}
PROMPTS = ("prompt", "caption", "text", "original_prompt", "prompts", "captions", "instruction")
HAS_LABEL = "has_label"


class Asked(NamedTuple):
    """Columns that the user names; None is to be found."""

    image_0: str | None = None
    image_1: str | None = None
    label: str | None = None
    label_0: str | None = None
    label_1: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Found:
    """Columns of a table's pairs."""

    images: tuple[str, str]  # image 0 and 1, or the chosen and the rejected one
    prompt: str
    labels: tuple[str, ...]  # one, two with a value for each image, or none where the first image is the chosen one
    has_label: str | None = None  # a row in which it is false has no label
    sure: bool = True  # the name of the label column tells that 1 prefers image 0
    named: bool = True  # the label columns are the user's choice, or that of a known format
    why: str = ""  # for people: why the first image is the chosen one, if its name does not say so

    @property
    def ordered(self) -> bool:
        return not self.labels

    @property
    def used(self) -> tuple[str, ...]:
        return (*self.images, *self.labels, self.prompt)

    def in_words(self) -> str:
        """Which column is what."""
        roles = ("chosen", "rejected") if self.ordered else ("image 0", "image 1")
        parts = [f"{role} {name}" for role, name in zip(roles, self.images, strict=True)]
        parts[0] += f" ({self.why})" * bool(self.why)
        labels = [f"label {' and '.join(self.labels)}"] if self.labels else []
        return ", ".join([*parts, *labels, f"prompt {self.prompt}"])


def find_columns(table: str, kinds: Mapping[str, str], asked: Asked) -> Found:
    """Find the columns of a table.

    Args:
        table: its path, for messages.
        kinds: `image`, `text`, `list`, `number`, `empty` or `other` for each column.
        asked: columns that the user names.

    Raises:
        UserValueError: if a column is missing, or more than one could be meant.
    """
    missing = [name for name in asked if name is not None and name not in kinds]
    if missing:
        raise _error(table, kinds, f"there is no column {', '.join(missing)}")
    _refuse_both(table, kinds, asked)
    images, ordered, why = _images(table, kinds, asked)
    prompt = asked.prompt or _prompt(table, kinds, images)
    has_label = HAS_LABEL if HAS_LABEL in kinds else None
    if ordered:
        return Found(images, prompt, (), has_label, why=why)
    labels, sure = _labels(table, kinds, asked, images)
    named = asked.label is not None or asked.label_0 is not None
    return Found(images, prompt, labels, has_label, sure, named)


def _refuse_both(table: str, kinds: Mapping[str, str], asked: Asked) -> None:
    """Refuse options of which one would be passed over."""
    ordered = asked.chosen or asked.rejected
    by_image = asked.label_0 or asked.label_1
    labels = asked.label or by_image
    if ordered and (labels or asked.image_0 or asked.image_1):
        other = labels or asked.image_0 or asked.image_1
        raise _error(
            table, kinds, f"{ordered} is named as the chosen or rejected image, and {other} beside it: name one form"
        )
    if asked.label and by_image:
        raise _error(table, kinds, f"{asked.label} and {by_image} are both named as labels: name one form")


def _images(table: str, kinds: Mapping[str, str], asked: Asked) -> tuple[tuple[str, str], bool, str]:
    for first, second, ordered in ((asked.chosen, asked.rejected, True), (asked.image_0, asked.image_1, False)):
        if first is not None and second is not None:
            return (first, second), ordered, ""
        if first is not None or second is not None:
            options = "--chosen_column and --rejected_column" if ordered else "--image_0_column and --image_1_column"
            raise _error(table, kinds, f"only one of its two images is named, {first or second}: name {options}")
    labelled = not {asked.label, asked.label_0, asked.label_1} <= {None}
    ordered_pairs = [] if labelled else [pair for pair in _pairs(kinds, OPPOSITES) if _both(kinds, pair)]
    sided_pairs = [pair for pair in _pairs(kinds, SIDES) if _both(kinds, pair)]
    found = [(pair, True) for pair in ordered_pairs] + [(pair, False) for pair in sided_pairs]
    whole = [(pair, ordered) for pair, ordered in found if all(kinds[name] == "image" for name in pair)]
    found = whole or found  # the image itself rather than its address
    if len(found) != 1:
        listed = "; ".join(" and ".join(pair) for pair, _ in found)
        raise _error(table, kinds, f"{len(found)} pairs of columns may be the images: {listed}" if found else "")
    (first, second), ordered = found[0]
    hpd = (first, second) == ("path1", "path2") and not labelled and not _judges(kinds)
    return (first, second), ordered or hpd, "as in HPDv3" if hpd else ""


def _judges(kinds: Mapping[str, str]) -> bool:
    """Whether a column may say which image is preferred; HPDv3's `choice_dist` counts votes in the order of paths."""
    return any(JUDGING & set(_words(name)) for name in kinds if name != "choice_dist")


def _pairs(kinds: Mapping[str, str], opposites: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """Pairs of image columns whose names differ in one word, `chosen_path` and `rejected_path`."""
    words = {name: _words(name) for name in kinds}
    found = []
    for (first, second), (name, other) in product(opposites, product(words, words)):
        sides = [[word for word in words[one] if word not in IMAGE_WORDS] for one in (name, other)]
        same = [one if one != first else second for one in words[name]] == words[other]
        clear = first in BARE or kinds[name] == "image" or IMAGE_WORDS & set(words[name])
        if sides == [[first], [second]] and same and clear:
            found.append((name, other))
    return found


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]


def _both(kinds: Mapping[str, str], pair: tuple[str, str]) -> bool:
    return all(kinds[name] in ("image", "text", "list", "other") for name in pair)


def _prompt(table: str, kinds: Mapping[str, str], images: tuple[str, str]) -> str:
    lower = {name.lower(): name for name in kinds if kinds[name] in ("text", "list") and name not in images}
    found = [lower[name] for name in PROMPTS if name in lower]
    if not found and kinds[images[0]] == "list":
        return images[0]  # messages, which begin with the prompt
    if not found or (len(found) > 1 and found[0].lower() != PROMPTS[0]):
        why = f"{' and '.join(found)} may be the prompt" if found else "none is called prompt or caption"
        raise _error(table, kinds, f"{why}: name --prompt_column")
    return found[0]


def _labels(
    table: str, kinds: Mapping[str, str], asked: Asked, images: tuple[str, str]
) -> tuple[tuple[str, ...], bool]:
    """Columns of the labels, and whether their name tells that 1 prefers image 0."""
    if asked.label is not None:
        return (asked.label,), asked.label.lower() not in INDEXES
    if asked.label_0 is not None or asked.label_1 is not None:
        if asked.label_0 is None or asked.label_1 is None:
            raise _error(
                table, kinds, "only one of its two labels is named: name --label_0_column and --label_1_column"
            )
        return (asked.label_0, asked.label_1), True
    found = _label_columns(kinds, images)
    if len(found) != 1:
        listed = "; ".join(" and ".join(names) for names in found)
        why = (
            f"{listed} may be the labels"
            if found
            else f"the images are {' and '.join(images)}, and no column is a label"
        )
        raise _error(
            table,
            kinds,
            f"{why}: name --label_column, or --label_0_column and --label_1_column, or if the preferred image has its "
            "own column --chosen_column and --rejected_column",
        )
    return found[0], found[0][0].lower() not in INDEXES


def _label_columns(kinds: Mapping[str, str], images: tuple[str, str]) -> list[tuple[str, ...]]:
    usable = [name for name in kinds if kinds[name] in ("text", "number", "other") and name not in images]
    found: list[tuple[str, ...]] = [(name,) for name in usable if name.lower() in (*LABELS, *INDEXES)]
    plain = {name: [word for word in _words(name) if word not in IMAGE_WORDS] for name in usable}
    for (first, second), (name, other) in product(SIDES, product(usable, usable)):
        same = [one if one != first else second for one in plain[name]] == plain[other]
        if (
            same
            and first in plain[name]
            and set(plain[name]) & {"label", "labels", "vote", "votes"}
            and len(plain[name]) == 2
        ):
            found.append((name, other))
    if not found and "label_0" in usable:
        found.append(("label_0",))
    return found


def _error(table: str, kinds: Mapping[str, str], why: str) -> UserValueError:
    why = why or (
        "no two of them are known to be images: name --chosen_column and --rejected_column, or --image_0_column, "
        "--image_1_column and --label_column; and --prompt_column"
    )
    return UserValueError(f"table: {table} has columns {', '.join(kinds) or 'of no name'}; {why}.")
