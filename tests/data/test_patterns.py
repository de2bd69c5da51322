"""Paths and patterns: what exists under its literal name is no pattern."""

import pytest

from lit_align.data.read_options import ReadOptions
from lit_align.data.shards.listing import find_shards
from lit_align.data.shards.patterns import expand

ODD = ["pairs [v2]", "a{b", "a{1,2}", "x*", "what?", "a}b", "[", "~", "-x", "tab\tand 'quote'", "ünï"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with shards 0.tar, 1.tar and 2.tar in folders of odd names."""
    for name in ODD:
        (tmp_path / name / "out").mkdir(parents=True)
        for number in range(3):
            (tmp_path / name / f"out/{number}.tar").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("name", ODD)
def test_a_path_that_exists_is_a_path_and_so_is_the_front_of_a_pattern(here, name):
    for folder in (f"{name}/out", f"{here}/{name}/out", f"file:{here}/{name}/out", f"./{name}/out/../out"):
        local = folder.removeprefix("file:")
        every = [f"{local}/{number}.tar" for number in range(3)]
        assert expand(folder) == [local]
        assert expand(f"{folder}/1.tar") == [f"{local}/1.tar"]
        assert expand(f"{folder}/*.tar") == every
        assert expand(f"{folder}/{{0..2}}.tar") == every
        assert expand(f"{folder}/[12].tar") == every[1:]
        with pytest.raises(FileNotFoundError, match=r"there is no file .*out/7\.tar"):
            expand(f"{folder}/{{1..7..6}}.tar")
        assert expand(f"{folder}/7.tar", must_exist=False) == [f"{local}/7.tar"]


def test_names_with_wildcards_beside_what_they_would_match(here):
    for name in ("0.tar", "1.tar", "[01].tar", "*.tar", "{0,1}.tar"):
        (here / name).touch()
        assert expand(name) == [name]
    assert expand("{0,1}.t*") == ["0.tar", "1.tar"]
    assert expand("?.tar") == ["*.tar", "0.tar", "1.tar"]
    assert expand("{[01],1}.tar") == ["[01].tar", "1.tar"]


def test_the_home_folder(here):
    (here / "home/pairs [1]").mkdir(parents=True)
    (here / "home/pairs [1]/0.tar").touch()
    (here / "~").rename(here / "other")
    assert expand("~/pairs [1]/*.tar") == [f"{here}/home/pairs [1]/0.tar"]


def test_one_shard_under_two_names_is_refused(here):
    (here / "link.tar").symlink_to(here / "x*/out/0.tar")
    for again in ("./x*/out/0.tar", f"{here}/x*/out/../out/0.tar", "link.tar"):
        with pytest.raises(ValueError, match="is named twice"):
            find_shards(["x*/out/0.tar", again], ReadOptions())
