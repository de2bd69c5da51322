"""What a folder was begun with, compared with what a command has now."""

import json

import pytest

from lit_align.common.manifest import check_manifest, differences
from lit_align.user_errors import UserValueError


def test_differences_by_hand():
    began = {
        "seed": 0,
        "model": {"repo": "a", "lora": {"rank": 4, "alpha": 8}},
        "files": [{"name": "a", "rows": 5}, {"name": "b", "rows": 2}, {"name": "c", "rows": 2}],
        "sizes": [1, 2],
        "gone": True,
        "prompts": ["x" * 100, "y" * 100],
    }
    now = {
        "seed": 0,
        "model": {"repo": "b", "lora": {"rank": 4, "alpha": None}},
        "files": [{"name": "a", "rows": 6}, {"name": "d", "rows": 2}, {"name": "c", "rows": 2}],
        "sizes": [1, 3],
        "new": "é" * 200,
        "prompts": ["x" * 100],
    }
    *found, prompts, new = differences(began, now)
    assert found == [
        'model.repo was "a", is "b"',
        "model.lora.alpha was 8, is null",
        "files: b is gone",
        "files: d is new",
        "files: a: rows was 5, is 6",
        "sizes was [1, 2], is [1, 3]",
        "gone was true, is null",
    ]
    assert prompts.startswith("prompts was 2 with digest ")
    assert new == f'new was null, is "{"é" * 116}...'
    assert differences(began, began) == []
    assert differences({"files": began["files"]}, {"files": began["files"][::-1]}) == ["files are in another order"]


def test_long_values_are_shown_short():
    (text,) = differences({"prompt": "x" * 500}, {"prompt": "y" * 500})
    assert text == f'prompt was "{"x" * 116}..., is "{"y" * 116}...'
    (text,) = differences({"all": list(range(100))}, {"all": list(range(99))})
    assert text.startswith("all was 100 with digest ")
    assert ", is 99 with digest " in text


def test_a_folder_is_resumed_with_what_it_was_begun_with(tmp_path):
    path, manifest = tmp_path / "new/generate.json", {"seed": 0, "sampling": {"steps": 5, "size": (8, 8)}}
    for _ in range(2):
        check_manifest(path, manifest, ["*.tar"])
    assert json.loads(path.read_text()) == {"seed": 0, "sampling": {"steps": 5, "size": [8, 8]}}
    changed = {str(number): number for number in range(6)} | {"seed": 1, "sampling": manifest["sampling"]}
    with pytest.raises(UserValueError) as error:
        check_manifest(path, changed, ["*.tar"])
    assert str(error.value) == (
        f"output: {path.parent} was begun with other values: seed was 0, is 1; 0 was null, is 0; 1 was null, is 1; "
        "2 was null, is 2; 3 was null, is 3; and 2 more. Resume with the old values, choose another folder, or delete "
        "this one."
    )
    path.write_text("{")
    with pytest.raises(UserValueError, match=r"generate\.json cannot be read: .*Choose another folder"):
        check_manifest(path, manifest, ["*.tar"])
    path.unlink()
    (tmp_path / "new/00000.tar").touch()
    with pytest.raises(UserValueError, match=r"new holds 00000\.tar, but no generate\.json that says how"):
        check_manifest(path, manifest, ["*.png", "*.tar"])
    assert not path.exists()
