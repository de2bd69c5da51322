"""Which columns of a table hold what."""

import pytest

from lit_align.data.importers.columns import Asked, find_columns


def find(names, asked=None, **kinds):
    """Columns found among text columns; `kinds` are those of other columns."""
    columns = {name: kinds.get(name, "text") for name in [*names.split(), *kinds]}
    found = find_columns("pairs.csv", columns, asked or Asked())
    return found.images, found.labels, found.prompt


@pytest.mark.parametrize(
    ("names", "images", "labels", "prompt"),
    [
        ("chosen rejected prompt quality_prompt style_prompt", ("chosen", "rejected"), (), "prompt"),
        ("text rejected_file_name chosen_file_name", ("chosen_file_name", "rejected_file_name"), (), "text"),
        ("path1 path2 prompt model1 model2 confidence", ("path1", "path2"), (), "prompt"),
        ("path1 path2 prompt label", ("path1", "path2"), ("label",), "prompt"),
        ("winnerImage loserImage caption", ("winnerImage", "loserImage"), (), "caption"),
        ("image_w image_l caption", ("image_w", "image_l"), (), "caption"),
        ("image1 image2 prompt preference", ("image1", "image2"), ("preference",), "prompt"),
        ("left_image right_image prompt winner", ("left_image", "right_image"), ("winner",), "prompt"),
        ("img_a img_b prompt votes_a votes_b", ("img_a", "img_b"), ("votes_a", "votes_b"), "prompt"),
        ("image_0_url image_1_url image_0_uid image_1_uid label_0 label_1 caption best_image_uid model_0 model_1",
         ("image_0_url", "image_1_url"), ("label_0", "label_1"), "caption"),
        ("Image_0 Image_1 Label Prompt", ("Image_0", "Image_1"), ("Label",), "Prompt"),
    ],
)  # fmt: skip
def test_known_names(names, images, labels, prompt):
    assert find(names) == (images, labels, prompt)


def test_messages_may_hold_the_prompt():
    assert find("model", chosen="list", rejected="list") == (("chosen", "rejected"), (), "chosen")


def test_images_come_before_their_addresses():
    names = "caption label_0 image_0_url image_1_url"
    assert find(names, jpg_0="image", jpg_1="image", label_1="number")[0] == ("jpg_0", "jpg_1")
    assert find(names, jpg_0="empty", jpg_1="empty", label_1="number")[0] == ("image_0_url", "image_1_url")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("image_0 image_1 image_a image_b label prompt", "2 pairs of columns may be the images: image_0 and image_1; "),
        ("chosen rejected image_0 image_1 prompt", "2 pairs of columns may be the images"),
        ("chosen rejected caption text", "caption and text may be the prompt: name --prompt_column"),
        ("image_0 image_1 label winner prompt", "label; winner may be the labels: name --label_column"),
        ("image_0 image_1 prompt", "no column is a label: name --label_column"),
        ("path1 picture2 prompt", "no two of them are known to be images: name --chosen_column and --rejected_column"),
        ("path1 path2 prompt human_pref", "no column is a label"),
        ("score_0 score_1 left right prompt", "no two of them are known to be images"),
    ],
)
def test_what_could_be_meant_twice_is_asked_for(names, message):
    with pytest.raises(ValueError, match=message):
        find(names)


def test_named_columns():
    asked = Asked(image_0="x", image_1="y", label_0="v", label_1="w", prompt="text")
    assert find("x y v w caption text", asked) == (("x", "y"), ("v", "w"), "text")
    assert find("path2 path1 prompt", Asked(chosen="path2", rejected="path1"))[0] == ("path2", "path1")
    with pytest.raises(ValueError, match=r"pairs.csv has columns x, y; there is no column z"):
        find("x y", Asked(chosen="x", rejected="z"))
    with pytest.raises(ValueError, match="only one of its two images is named, x: name --chosen_column and"):
        find("x y prompt", Asked(chosen="x"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(chosen="x", rejected="y", label="v"), "x is named as the chosen or rejected image, and v beside it"),
        (Asked(chosen="x", rejected="y", image_0="x", image_1="y"), "and x beside it: name one form"),
        (Asked(image_0="x", image_1="y", label="v", label_1="w"), "v and w are both named as labels: name one form"),
        (Asked(label_1="w"), "only one of its two labels is named"),
    ],
)
def test_no_option_is_passed_over(asked, message):
    with pytest.raises(ValueError, match=message):
        find("x y v w image_0 image_1 prompt", asked)


def test_a_column_of_an_index_stays_one_when_it_is_named():
    kinds = dict.fromkeys(("image_0", "image_1", "prompt", "winner", "label"), "text")
    assert not find_columns("pairs.csv", kinds, Asked(label="winner")).sure
    assert find_columns("pairs.csv", kinds, Asked(label="label")).named
