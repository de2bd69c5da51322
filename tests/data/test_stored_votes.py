"""Stored scores decide alike, in whatever order they lie."""

import numpy as np
import pytest
import torch

from lit_align.data import PreferenceDataModule
from lit_align.data.labels.live_vote import LiveVote
from lit_align.data.labels.score_files import Identity, Scores, read_scores, side_file, survey, write_scores
from lit_align.data.labels.stored import VotedLabels
from lit_align.scoring import Colourfulness, HighContrast, Sharpness
from lit_align.scoring.vote import Ballot, Vote
from tests.support.paths import PAIRS

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


def test_the_balance_of_stored_votes_reaches_the_batch():
    """Two to one, one for and two abstentions, and unanimous votes among the bundled pairs, counted by hand."""
    margins = {"clip": 0.03, "style": 4.0, "colour": 40.0}
    shard, vote = str(PAIRS / "train/00000.tar"), Vote([*margins], margins=margins)
    data = PreferenceDataModule(shard, resolution=32, batch_size=2, num_workers=0, vote=vote)
    data.setup("fit")
    found = {}
    for batch in data.train_dataloader():
        found |= dict(zip(batch.pairs.numbers, batch.pairs.balance.tolist(), strict=True))
    stored = [read_scores(side_file(shard))[name] for name in margins]
    differences = np.stack([(scores.score_0.double() - scores.score_1.double()).numpy() for scores in stored])
    votes = np.sign(differences) * (np.abs(differences) > np.array([*margins.values()])[:, None])
    expected = np.abs(votes.sum(0)) / 3
    assert len(found) == len(expected) == 26
    assert [found[number] for number in range(26)] == pytest.approx(expected.tolist())
    assert len(set(expected.round(3))) >= 3


def test_the_balance_of_live_votes_reaches_the_batch():
    data = PreferenceDataModule(str(PAIRS / "train/00000.tar"), resolution=32, batch_size=26, num_workers=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    scorers = {"colour": Colourfulness(), "sharp": Sharpness(), "contrast": HighContrast()}
    vote = Vote([*scorers], margins={"colour": 80.0})
    ordered = LiveVote(vote, scorers).order(batch)
    sides = [list(side) for side in (batch.chosen, batch.rejected)]
    scored = {name: [scorer.score(side, batch.prompts).double() for side in sides] for name, scorer in scorers.items()}
    verdict = vote.decide(Ballot({name: first - second for name, (first, second) in scored.items()}, batch.pairs.human))
    assert torch.equal(ordered.pairs.balance, verdict.balance)
    assert len(set(verdict.balance.tolist())) >= 2
    assert not torch.equal(verdict.balance, verdict.vote_share)
