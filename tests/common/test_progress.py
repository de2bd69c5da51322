"""Progress of long work, in a log file and on a terminal."""

import io
import sys

import pytest

from lit_align.common.progress import ProgressLines, show_progress, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def advance(lines, clock, seconds, n=1):
    clock.now += seconds
    lines.update(n)


def test_a_log_file_gets_a_line_every_thirty_seconds(clock, capsys):
    with ProgressLines(1000, "importing", "pair", done=200, clock=clock) as lines:
        for _ in range(29):
            advance(lines, clock, 1, 4)
        assert capsys.readouterr().err == ""
        lines.set_postfix({"loss": "0.5"})
        advance(lines, clock, 1, 4)
        assert capsys.readouterr().err == "importing: 320/1,000 (32%), 4 pair/s, 0:02:50 left, loss=0.5\n"
        for _ in range(120):
            advance(lines, clock, 0.25, 0)
        assert len(capsys.readouterr().err.splitlines()) == 1
        lines.update(680)
    assert capsys.readouterr().err == "importing: 1,000/1,000 (100%), 13.3 pair/s, 0:01:00 taken, loss=0.5\n"


def test_bytes_are_counted_in_prefixes_and_a_total_may_be_unknown(clock, capsys):
    with ProgressLines(None, "inspecting", "B", clock=clock) as lines:
        advance(lines, clock, 30, 3_000_000)
    assert capsys.readouterr().err.splitlines()[0] == "inspecting: 3.00M, 100k B/s"


@pytest.mark.parametrize(("seconds", "shown"), [(1.9, 0), (2.0, 1)])
def test_brief_work_is_shown_only_if_it_lasts(clock, capsys, seconds, shown):
    with ProgressLines(9, "opening", "file", delay=2.0, clock=clock) as lines:
        advance(lines, clock, seconds, 9)
    assert len(capsys.readouterr().err.splitlines()) == shown


def test_hidden_and_empty_work_prints_nothing(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for total, hidden in ((5, True), (0, False)):
        with show_progress(total, "scoring", "pair", hidden=hidden) as progress:
            progress.update(total)
    assert terminal.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with show_progress(4, "scoring", "pair", done=1) as progress:
        progress.set_postfix({"loss": "0.5"})
        progress.update(3)
    assert "\r" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()
    assert "loss=0.5" in terminal.getvalue()


def test_track_counts_what_is_done(capsys):
    assert list(track(iter("abc"), 3, "reading", "shard")) == ["a", "b", "c"]
    assert capsys.readouterr().err.startswith("reading: 3/3 (100%)")
    assert list(track([], 0, "reading", "shard")) == []
    assert capsys.readouterr().err == ""
