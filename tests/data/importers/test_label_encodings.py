"""What the values of a label column mean."""

from collections import Counter

import pytest

from lit_align.data.importers.label_encodings import Values, canonical, find_encoding
from lit_align.data.importers.rejects import Rejected

NAMES = ("image_0", "image_1")
NOT_GIVEN = Values()


def read(values, images=NAMES, given=NOT_GIVEN, **more):
    """Labels of image 0 for the values of a column, None for those left out."""
    rows = [(value if isinstance(value, tuple) else (value,)) for value in values]
    counts = Counter(tuple(map(canonical, row)) for row in rows if "" not in map(canonical, row))
    columns = ["label"] if len(rows[0]) == 1 else ["votes_0", "votes_1"]
    encoding = find_encoding(counts, columns, images, given, **more)
    found = []
    for row in rows:
        try:
            found.append(encoding.label_0(row))
        except Rejected:
            found.append(None)
    return found


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1, 0, 0.5, "1.0", None], [1, 0, 0.5, 1, None]),
        ([1, -1, 0, "-1"], [1, 0, 0.5, 0]),
        ([1, 2, "2"], [1, 0, 0]),
        ([True, False, "True"], [1, 0, 1]),
        ([0.7, 0.2, 0.5, 1, ""], [1, 0, 0.5, 1, None]),
        ([0.9, 0.00001, 0.3], [1, 0, 0]),
        (["left", "Right", "tie", " left "], [1, 0, 0.5, 1]),
        (["chosen image 1", "chosen image 2", "both are equally good"], [1, 0, 0.5]),
        (["A", "B", "B is slightly better"], [1, 0, 0]),
        (["model_a", "model_b", "tie (bothbad)"], [1, 0, 0.5]),
        (["first", "second"], [1, 0]),
        (["image_1", "image_0"], [0, 1]),  # names of the columns
        (["image 0", "image 1"], [1, 0]),
        ([(3, 1), (0, 2), (2, 2)], [1, 0, 0.5]),
        ([(1, 0), (0.5, 0.5), (0, 1)], [1, 0.5, 0]),
        ([(0.61, 0.39), (0.2, 0.8)], [1, 0]),
        ([(True, False), (False, True)], [1, 0]),
    ],
)
def test_known_encodings(values, labels):
    assert read(values) == labels


def test_numbers_in_words_follow_the_names_of_the_images():
    assert read(["image 1"], ("image_1", "image_2")) == [1]
    assert read(["image 1"], ("image_0", "image_1")) == [0]
    with pytest.raises(ValueError, match=r"'option 1' \(1 rows\); for 1 row it is not known"):
        read(["option 1"], ("left", "right"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["yes", "no", "no"], r"column label holds 'no' \(2 rows\), 'yes' \(1 rows\); for 3 rows it is not known"),
        ([1, 0, 1, 3, 4], r"for 2 rows it is not known"),
        ([0, 1, 2, 1], r"0, 1 and 2 may number two images and a tie"),
        ([5, 1, 3, 2], r"it is not known which image they prefer. Say it: --label_image_0 VALUE"),
        ([1] * 50 + [0] * 48 + [-1] * 2, "-1 may prefer image_1 and 0 be a tie, or -1 may mark rows without a label"),
        ([(1, 2), (2, 1)], "1 and 2 may be ranks, of which 1 is the better, or scores"),
        (["left is bad", "right is bad"], "for 2 rows it is not known"),
        ([("a", 1), ("b", 2)], r"votes_0 and votes_1 holds .*they are not numbers"),
        ([(1, 1), (1, 0), (0, 0)], r"for 2 rows they do not add up to 1"),
    ],
)
def test_unknown_encodings_are_shown_and_stop_the_import(values, message):
    with pytest.raises(ValueError, match=message):
        read(values)


def test_one_odd_label_is_left_out():
    assert read([1, 0, 1, 7, 0.5]) == [1, 0, 1, None, 0.5]
    assert read([1, -1] * 50 + ["both"] * 2)[-3:] == [0, None, None]


@pytest.mark.parametrize("values", [[0, 1, 1], [0] * 9, [1, 1], [0, 1, -1], [0, 1] * 20 + ["tie"]])
def test_a_number_may_be_an_index_where_the_name_does_not_say(values):
    with pytest.raises(ValueError, match="0 and 1 may be the number of an image"):
        read(values, sure=False)


def test_a_number_that_is_no_index_says_it_without_the_name():
    assert read([1, 2], sure=False) == [1, 0]
    assert read([1, -1], sure=False) == [1, 0]
    assert read([1, 1], ("image_1", "image_2"), sure=False) == [1, 1]
    with pytest.raises(ValueError, match="for 2 rows it is not known"):  # shares, but whose?
        read([0.7, 0.2], sure=False)


def test_given_values():
    given = Values(("yes",), ("no", "never"), ("?",))
    assert read(["Yes", "no", "never", "?", "maybe"], given=given) == [1, 0, 0, 0.5, None]
    with pytest.raises(ValueError, match="'1' is given two meanings"):
        read([1], given=Values(("1",), ("1.0",)))
    with pytest.raises(ValueError, match="have a value for each image"):
        read([(1, 0)], given=given)
