"""Stored scores decide alike, in whatever order they lie."""

import numpy as np
import torch

from lit_align.data.labels.score_files import Identity, Scores, side_file, survey, write_scores
from lit_align.data.labels.stored import VotedLabels
from lit_align.scoring.vote import Vote

KEYS = [f"{number:03d}" for number in range(40)]
HUMAN = np.random.default_rng(0).choice([-1, 0, 1], 40).astype(np.int8)


def scores(draw, order=range(40), contents=None):
    values = torch.from_numpy(np.random.default_rng(draw).normal(size=(2, 40)).astype(np.float32))[:, list(order)]
    contents = contents or [f"{number:016x}" for number in range(1, 41)]
    return Scores(Identity(1, "w"), [KEYS[n] for n in order], [contents[n] for n in order], *values)


def decide(folder, first, second, ties="human"):
    folder.mkdir()
    shard = str(folder / "a.tar")
    write_scores(side_file(shard), {"first": first, "second": second})
    vote = Vote(["first", "second", "human"], ties=ties, margins={"first": 0.1})
    return VotedLabels(vote, None, survey([shard], None, ["first", "second"])).decide(shard, KEYS, HUMAN)


def test_scores_in_the_shards_order_decide_as_those_in_another(tmp_path):
    straight = decide(tmp_path / "straight", scores(1), scores(2))
    turned = decide(tmp_path / "turned", scores(1, range(39, -1, -1)), scores(2))
    assert {-1, 1} <= set(straight.sign.tolist())
    assert np.array_equal(straight.sign, turned.sign)
    assert np.array_equal(straight.vote_share, turned.vote_share)
    assert np.array_equal(straight.balance, turned.balance)
    assert straight.balance.any()
    assert straight.contents == turned.contents == [f"{number:016x}" for number in range(1, 41)]
    assert straight.faults == turned.faults == {}


def test_a_sample_without_a_score_or_of_other_contents_is_named_and_the_others_are_decided(tmp_path):
    whole = decide(tmp_path / "whole", scores(1), scores(2))
    broken, other = scores(1), [f"{number:016x}" for number in range(1, 41)]
    broken.score_0[3] = float("nan")
    other[7] = "f" * 16
    found = decide(tmp_path / "broken", broken, scores(2, contents=other))
    assert sorted(found.faults) == [3, 7]
    assert "key 003" in found.faults[3]
    assert "lacks a score" in found.faults[3]
    assert "key 007: its scores are stale" in found.faults[7]
    kept = [number for number in range(40) if number not in found.faults]
    assert np.array_equal(found.sign[kept], whole.sign[kept])
    assert found.sign[[3, 7]].tolist() == [0, 0]
