"""Paths as people type them, and as they can be typed again."""

import shlex
from pathlib import Path

import pytest

from lit_align.cli import expand_home as expand_word
from lit_align.commands.shared.command_line import run_command
from lit_align.common.paths import as_argument, expand_home

ODD = ["pairs [v2]/out", "[v2]/x", "{a,b}/x", "a{b", "#1/x", "~/x", "a'b", 'a"b', "$HOME", "tab\tx", "&a", "- a/x", "*"]


@pytest.mark.parametrize("path", [*ODD, "pairs/index.json", "/tmp/x y"])
def test_what_is_printed_can_be_pasted_back(path):
    """Also through the parser of options, for which some first characters are YAML."""
    taken = []

    def command(shards: str | list[str], output: Path, scores: str | None = None) -> None:
        taken.extend([shards, output, scores])

    words = shlex.split(" ".join(f"--{name} {as_argument(path)}" for name in ("shards", "output", "scores")))
    run_command(command, words, "lit-align")
    assert [Path(one) for one in taken] == [Path(path)] * 3


def test_only_odd_paths_are_quoted():
    assert as_argument(Path("pairs/v2/index.json")) == "pairs/v2/index.json"
    assert as_argument("pairs [v2]/out") == "'pairs [v2]/out'"


def test_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert expand_home("~/a b") == "/home/someone/a b"
    assert [expand_home(path) for path in ("a~/b", "s3://a/~", "a/~/b")] == ["a~/b", "s3://a/~", "a/~/b"]
    assert expand_word("--data.train_shards=~/a/*.tar") == "--data.train_shards=/home/someone/a/*.tar"
    assert expand_word("~/a") == "/home/someone/a"
    assert [expand_word(word) for word in ("--x=~", "a~/", "--x=y=~/")] == ["--x=~", "a~/", "--x=y=~/"]
    (tmp_path / "~").mkdir()
    assert expand_home("~/a") == expand_word("~/a") == "~/a"
