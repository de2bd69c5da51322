"""Import of HPDv2's annotations."""

import json

import pytest

from lit_align.cli import main
from lit_align.commands.importing.command import hpd
from tests.support.imports import BUNDLED, files, read_all, rejects


def test_hpd_train(images):
    entries = [
        {"prompt": "first", "file_path": ["0.jpg", "1.jpg"], "human_preference": [1, 0], "user_hash": "u"},
        {"prompt": "second", "file_path": ["2.jpg", "3.jpg"], "human_preference": [0, 1]},
        {"prompt": "gone", "file_path": ["4.jpg", "9.jpg"], "human_preference": [1, 0]},
        {"prompt": "both", "file_path": ["4.jpg", "5.jpg"], "human_preference": [1, 1]},
        {"prompt": "one", "file_path": ["4.jpg"], "human_preference": [1]},
        {"prompt": "odd", "file_path": ["4.jpg", "5.jpg"], "human_preference": [1]},
        {"prompt": "best of three", "file_path": ["0.jpg", "1.jpg", "2.jpg"], "human_preference": [0, 1, 0]},
    ]
    (images / "train.json").write_text(json.dumps(entries))
    main(["import", "hpd", f"--annotations={images}/train.json", f"--output={images}/out", "--workers=1"])
    pairs = read_all(images / "out")
    assert [(pair.prompt, pair.label_0, more["image_0"], more["image_1"]) for pair, more in pairs] == [
        ("first", 1, "0.jpg", "1.jpg"),
        ("second", 0, "2.jpg", "3.jpg"),
        ("best of three", 0, "0.jpg", "1.jpg"),
        ("best of three", 1, "1.jpg", "2.jpg"),
    ]
    assert pairs[0][1] == {"entry": 0, "image_0": "0.jpg", "image_1": "1.jpg", "user_hash": "u"}
    assert (pairs[1][0].image_0, pairs[1][0].image_1) == (BUNDLED[2].image_0, BUNDLED[3].image_0)
    assert rejects(images / "out") == [
        (2, "train.json, entry 2, images 0 and 1", "image missing"),
        (3, "train.json, entry 3, images 0 and 1", "labels do not add up to 1"),
        (4, "train.json, entry 4, images 0 and 1", "fewer than two images"),
        (5, "train.json, entry 5, images 0 and 1", "human_preference is not one number for each image"),
        (7, "train.json, entry 6, images 0 and 2", "labels do not add up to 1"),
    ]


def test_hpd_rankings(images):
    """The majority of the annotators decides each pair; without annotators the rank decides."""
    ranks = [[1, 2, 3], [2, 1, 3], [1, 3, 2], [3, 1, 2]]
    raw = [{"rank": rank, "user_hash": "u"} for rank in ranks]
    names = ["0.jpg", "1.jpg", "2.jpg"]
    entries = [
        {"prompt": "raw", "image_path": names, "rank": [3, 2, 1], "raw_annotations": raw},
        {"prompt": "lists", "image_path": names, "raw_annotations": ranks[:1]},
        {"prompt": "rank", "image_path": names, "rank": [2, 2, 1]},
    ]
    (images / "test.json").write_text(json.dumps(entries))
    for workers in (1, 2):
        hpd(f"{images}/{workers}", f"{images}/test.json", f"{images}/train", pairs_per_shard=2, workers=workers)
    pairs = read_all(images / "1")
    assert files(images / "1") == files(images / "2")
    assert [pair.label_0 for pair, _ in pairs] == [0.5, 1, 1, 1, 1, 1, 0.5, 0, 0]
    assert [(more["votes_0"], more["votes_1"]) for _, more in pairs[:3]] == [(2, 2), (3, 1), (3, 1)]
    assert pairs[7][1] == {"entry": 2, "image_0": "0.jpg", "image_1": "2.jpg", "rank_0": 2, "rank_1": 1}
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/test. Name the one"):
        hpd(f"{images}/3", f"{images}/test.json", workers=1)
    (images / "train.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a list of entries; it holds a dict"):
        hpd(f"{images}/3", f"{images}/train.json", workers=1)
