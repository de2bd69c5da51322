"""Encodings of labels: which image each value of a label column prefers, decided on all values of the column."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lit_align.data.importers.rejects import Rejected
from lit_align.user_errors import UserValueError

SHARE = 0.05  # of labelled rows; if more of them cannot be read, the import stops
SHOWN = 12  # values in a message
NUMBERS = (
    {"1": 1.0, "0": 0.0, "0.5": 0.5},
    {"1": 1.0, "-1": 0.0, "0": 0.5},
    {"1": 1.0, "2": 0.0},
    {"true": 1.0, "false": 0.0},
)
SIDES = (("left", "right"), ("first", "second"), ("a", "b"), ("one", "two"), ("1", "2"), ("0", "1"))
TIES = {"tie", "ties", "tied", "draw", "equal", "same", "both", "neither", "similar", "indifferent", "even"}
NOISE = re.compile(  # words that may stand beside the one that names a side
    "images?|img|picture|photo|pic|jpg|png|option|choice|chosen|model|response|candidate|sample|output|side|number|the|"
    "is|was|are|better|best|preferred|prefers?|preference|wins?|winner|much|slightly|far|clearly|strongly|equally|no|it|"
    "bad|good|bothbad"
)
DENIAL = re.compile(r"\b(no|bad)\b")  # beside one side: `left is bad`


class Values(NamedTuple):
    """Values of a label column that the user has given a meaning."""

    image_0: tuple[str, ...] = ()
    image_1: tuple[str, ...] = ()
    tie: tuple[str, ...] = ()


class Encoding(NamedTuple):
    """Label of image 0 for each value of one column, or for the values of two columns, one for each image."""

    labels: Mapping[str, float] | None  # None: numbers
    words: str  # what it means, for people
    plain: bool = False  # 0, 0.5 and 1, which a shard can hold as they are

    def label_0(self, values: Sequence[Any]) -> float:
        """Label of image 0: 1 if it is preferred, 0 if image 1 is, 0.5 for a tie.

        Raises:
            Rejected: if a value is missing or unknown.
        """
        keys = [canonical(value) for value in values]
        if "" in keys:
            raise Rejected("no label")
        unknown = [] if self.labels is None else [key for key in keys if key not in self.labels]
        if unknown:
            known = ", ".join(self.labels or ())
            raise Rejected(
                "label is not 0, 0.5 or 1" if self.plain else f"label is none of {known}", ascii(unknown[0])[:60]
            )
        if self.labels is not None and len(keys) == 1:
            return self.labels[keys[0]]
        numbers = [_number(key) for key in keys]
        if any(math.isnan(number) for number in numbers):
            raise Rejected("label is no number", ascii(values)[:60])
        if self.labels is not None and sum(numbers) != 1:
            raise Rejected("labels do not add up to 1", " and ".join(f"{number:g}" for number in numbers))
        first, second = (*numbers, 0.5)[:2]
        return 0.5 if first == second else float(first > second)


def canonical(value: Any) -> str:
    """One form of equal labels: 1, 1.0, "1" and " 1.0" are "1"; empty for a missing one."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    text = " ".join(str(value).split()).lower()
    number = math.nan if text in ("true", "false") else _number(text)
    return text if math.isnan(number) else f"{number + 0.0:.10g}"


def _number(text: str) -> float:
    try:
        number = {"true": 1.0, "false": 0.0}.get(text)
        number = float(text) if number is None else number
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def find_encoding(
    counts: Counter[tuple[str, ...]], columns: Sequence[str], images: Sequence[str], given: Values, sure: bool = True
) -> Encoding:
    """Find out what the labels mean.

    Args:
        counts: rows by their canonical labels, without missing ones.
        columns: names of the label columns, one, or two with a value for each image.
        images: names of the columns of image 0 and image 1.
        given: values whose meaning the user names.
        sure: the column's name tells that 1 prefers image 0; `winner` would not.

    Raises:
        UserValueError: if more than `SHARE` of the labels cannot be read; it shows the values.
    """
    if any(given):
        return _given(given, columns, images)
    if len(columns) == 2:
        return _find_of_two(counts, columns, images)
    one = Counter({keys[0]: count for keys, count in counts.items()})
    numbers = [_number(key) for key in one]
    best = max((_of_numbers(one), _of_words(one, images)), key=lambda labels: _covered(one, labels))
    missed = _missed(one, best)
    shares = bool(missed) and all(0 <= number <= 1 for number in numbers) and not {"true", "false"} & set(one)
    if shares and sure:
        return Encoding(None, f"more than 0.5 prefers {images[0]}, less {images[1]}")
    if {"0", "1", "2"} <= set(one) and "0.5" not in one:
        raise _refuse(one, columns, "0, 1 and 2 may number two images and a tie, or begin with the tie")
    if _too_many(missed, one):
        raise _refuse(one, columns, f"for {_rows(missed)} it is not known which image they prefer")
    if best is NUMBERS[1] and one["0"] > one["-1"] > 0:
        raise _refuse(one, columns, f"-1 may prefer {images[1]} and 0 be a tie, or -1 may mark rows without a label")
    if not sure and _may_be_index(best, one, images):
        raise _refuse(one, columns, f"0 and 1 may be the number of an image, or say whether {images[0]} is preferred")
    return Encoding(best, _in_words(best, one, images), best is NUMBERS[0])


def _may_be_index(best: Mapping[str, float], counts: Counter[str], images: Sequence[str]) -> bool:
    """Whether 0 and 1 are read as labels of image 0, and may number the images."""
    if set(counts) == {"1"}:
        return tuple(map(_side, images)) != ("1", "2")
    return best is NUMBERS[0] or (best is NUMBERS[1] and "0" in counts)


def _given(given: Values, columns: Sequence[str], images: Sequence[str]) -> Encoding:
    if len(columns) == 2:
        raise UserValueError(
            f"label_image_0, label_image_1 and label_tie give the meaning of one --label_column; {columns[0]} and "
            f"{columns[1]} have a value for each image."
        )
    labels: dict[str, float] = {}
    for label, values in ((1.0, given.image_0), (0.0, given.image_1), (0.5, given.tie)):
        for value in map(canonical, values):
            if labels.setdefault(value, label) != label:
                raise UserValueError(f"label value {value!r} is given two meanings. Give it one.")
    return Encoding(labels, _in_words(labels, Counter(), images))


def _find_of_two(counts: Counter[tuple[str, ...]], columns: Sequence[str], images: Sequence[str]) -> Encoding:
    title = " and ".join(columns)
    named = Counter({" and ".join(keys): count for keys, count in counts.items()})
    words = Counter({" and ".join(keys): n for keys, n in counts.items() if any(math.isnan(_number(k)) for k in keys)})
    if _too_many(words, named):
        raise _refuse(named, columns, f"for {_rows(words)} they are not numbers")
    if set(counts) == {("1", "2"), ("2", "1")}:
        raise _refuse(named, columns, "1 and 2 may be ranks, of which 1 is the better, or scores, of which 2 is")
    if not all(key in NUMBERS[0] for keys in counts for key in keys if not math.isnan(_number(key))):
        return Encoding(None, f"the larger of {title} prefers its image, {images[0]} or {images[1]}")
    odd = Counter({" and ".join(keys): n for keys, n in counts.items() if sum(map(_number, keys)) != 1})
    if _too_many(odd, named):
        raise _refuse(named, columns, f"for {_rows(odd)} they do not add up to 1")
    return Encoding(NUMBERS[0], f"the image with 1 is preferred, 0.5 twice is a tie ({title})", True)


def _of_numbers(counts: Counter[str]) -> Mapping[str, float]:
    return max(NUMBERS, key=lambda labels: _covered(counts, labels))  # of equal ones the first


def _of_words(counts: Counter[str], images: Sequence[str]) -> Mapping[str, float]:
    """Labels of words: names of the image columns, sides such as `left`, or numbers such as `image 2`; and ties."""
    if set(counts) <= set(NUMBERS[0]):
        return {}
    names = [canonical(image) for image in images]
    if names[0] in counts or names[1] in counts:
        ties = {key: 0.5 for key in counts if _side(key) == "tie"}
        return {names[0]: 1.0, names[1]: 0.0, **ties}
    sides = {key: _side(key) for key in counts if math.isnan(_number(key))}
    found = set(sides.values()) - {"tie", ""}
    own = tuple(_side(name) for name in names)  # image columns 1 and 2, and a value `image 1`
    fitting = [pair for pair in (own, *SIDES) if found and found <= set(pair)]
    if not fitting or (found <= {"1"} and not found <= set(own)):  # 1 may be the first or the second
        return {}
    meaning = {fitting[0][0]: 1.0, fitting[0][1]: 0.0, "tie": 0.5}
    return {key: meaning[side] for key, side in sides.items() if side in meaning}


def _side(text: str) -> str:
    """The word that names a side, or `tie`; empty if there is none, or more than one."""
    words = [word for word in re.findall(r"[a-z]+|\d+", text.lower()) if not NOISE.fullmatch(word)]
    if words and all(word in TIES for word in words):
        return "tie"
    if not words and ("no preference" in text.lower() or "bad" in text.lower()):
        return "tie"
    return words[0] if len(words) == 1 and not DENIAL.search(text.lower()) else ""


def _covered(counts: Counter[str], labels: Mapping[str, float]) -> int:
    return sum(count for key, count in counts.items() if key in labels)


def _missed(counts: Counter[str], labels: Mapping[str, float]) -> Counter[str]:
    return Counter({key: count for key, count in counts.items() if key not in labels})


def _too_many(missed: Counter[str], counts: Counter[str]) -> bool:
    """Whether more than one label, and more than their `SHARE`, cannot be read; a single one is a typing error."""
    return missed.total() == counts.total() > 0 or missed.total() > max(1, SHARE * counts.total())


def _rows(counts: Counter[str]) -> str:
    return f"{counts.total():,} rows" if counts.total() != 1 else "1 row"


def _in_words(labels: Mapping[str, float], counts: Counter[str], images: Sequence[str]) -> str:
    says = {1.0: f"prefers {images[0]}", 0.0: f"prefers {images[1]}", 0.5: "is a tie"}
    found = [key for key in labels if not counts or key in counts][:SHOWN]
    return ", ".join(f"{key} {says[labels[key]]}" + f" ({counts[key]:,} rows)" * bool(counts) for key in found)


def _refuse(counts: Counter[str], columns: Sequence[str], why: str) -> UserValueError:
    listed = [f"{key!r:.60} ({count:,} rows)" for key, count in counts.most_common(SHOWN)]
    more = [f"and {len(counts) - SHOWN} more values"] if len(counts) > SHOWN else []
    if len(columns) == 2:
        remedy = "Correct them, or name other columns with --label_0_column and --label_1_column, or --label_column."
    else:
        remedy = (
            "Say it: --label_image_0 VALUE for those that prefer image 0, --label_image_1 VALUE for those that prefer "
            "image 1, --label_tie VALUE for ties; others are then left out and counted. Or name another --label_column."
        )
    return UserValueError(f"label: column {' and '.join(columns)} holds {', '.join([*listed, *more])}; {why}. {remedy}")
