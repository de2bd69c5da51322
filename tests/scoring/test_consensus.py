"""Every rule and every tie rule by hand, and properties that hold for all votes."""

import hashlib
import random

import pytest
import torch

from lit_align.scoring import consensus
from lit_align.scoring.vote import Ballot, Vote

# Pairs in rows; each scorer's score of image 0 minus its score of image 1.
DIFFERENCES = {
    "clip": torch.tensor([0.02, 0.02, -0.01, 0.0, 0.03]),
    "style": torch.tensor([5.0, -1.0, -2.0, 0.0, 1.0]),
    "colour": torch.tensor([-80.0, -30.0, -10.0, 0.0, 9.0]),
    "sharp": torch.tensor([-1.0, 1.0, -3.0, 2.0, 4.0]),
}
HUMAN = torch.tensor([1, -1, 0, 0, -1])
KEYS = ["a", "b", "c", "d", "e"]
SCALES = {"clip": 0.01, "style": 2.0, "colour": 40.0, "sharp": 1.0}
BALLOT = Ballot(DIFFERENCES, HUMAN, KEYS, SCALES)
THREE, FOUR = ["clip", "style", "colour"], ["clip", "style", "colour", "sharp"]


@pytest.mark.parametrize(
    ("vote", "signs", "shares"),
    [
        # + + -, + - -, - - -, 0 0 0, + + +
        (Vote(THREE), [1, -1, -1, 0, 1], [2 / 3, 2 / 3, 1, 0, 1]),
        # + + - -, + - - +, all -, 0 0 0 +, all +: two ties of two against two
        (Vote(FOUR, ties="skip"), [0, 0, -1, 1, 1], [0, 0, 1, 0.25, 1]),
        (Vote(FOUR, ties="human"), [1, -1, -1, 1, 1], [0, 0, 1, 0.25, 1]),
        (Vote(FOUR, ties="prefer:colour"), [-1, -1, -1, 1, 1], [0, 0, 1, 0.25, 1]),
        # the tie breaker may be no voter, and may abstain
        (Vote(["clip", "colour"], ties="prefer:style"), [1, -1, -1, 0, 1], [0, 0, 1, 0, 1]),
        # the human label as a voter: + + - +, + - - -, - - - 0, 0 0 0 0, + + + -
        (Vote([*THREE, "human"]), [1, -1, -1, 0, 1], [0.75, 0.75, 0.75, 0, 0.75]),
        # clip weighs as much as the two others together, then more
        (Vote(THREE, weights={"clip": 2.0}, ties="skip"), [1, 0, -1, 0, 1], [0.75, 0, 1, 0, 1]),
        (Vote(THREE, weights={"clip": 2.5}), [1, 1, -1, 0, 1], [3.5 / 4.5, 2.5 / 4.5, 1, 0, 1]),
        # colour abstains up to 30: + + -, + - 0, - - 0, 0 0 0, + + 0
        (Vote(THREE, margins={"colour": 30.0}, ties="skip"), [1, 0, -1, 0, 1], [2 / 3, 0, 2 / 3, 0, 2 / 3]),
        # no share where the tie rule decided
        (Vote(THREE, rule="unanimous", ties="skip"), [0, 0, -1, 0, 1], [0, 0, 1, 0, 1]),
        (Vote(THREE, rule="unanimous"), [1, -1, -1, 0, 1], [0, 0, 1, 0, 1]),
        # an abstention is no agreement: + + 0, + - 0, - - 0, 0 0 0, + + 0
        (Vote(THREE, rule="unanimous", ties="skip", margins={"colour": 80.0}), [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
        # margins are those of the vote; the tie breaker decides by its raw difference: 0 +, 0 0, 0 0, 0 0, + 0
        (
            Vote(["clip", "style"], ties="prefer:style", margins={"clip": 0.02, "style": 2.0}),
            [1, -1, -1, 0, 1],
            [0.5, 0, 0, 0, 0.5],
        ),
        (Vote(["style"], rule="single", ties="skip"), [1, -1, -1, 0, 1], [1, 1, 1, 0, 1]),
        # raw sums: -74.98, -30.98, -12.01, 0, 10.03; one voter of three is for the first verdict
        (Vote(THREE, rule="vanilla", ties="skip"), [-1, -1, -1, 0, 1], [1 / 3, 2 / 3, 1, 0, 1]),
        (Vote(FOUR, rule="vanilla", ties="skip"), [-1, -1, -1, 1, 1], [0.5, 0.5, 1, 0.25, 1]),
        # style abstains up to 1 and colour up to 30: -74.98, 0.02, -2.01, 0, 0.03
        (
            Vote(THREE, rule="vanilla", ties="skip", margins={"style": 1.0, "colour": 30.0}),
            [-1, 1, -1, 0, 1],
            [1 / 3, 1 / 3, 2 / 3, 0, 1 / 3],
        ),
        # over scales: 2 + 2.5 - 2, 2 - 0.5 - 0.75, -1 - 1 - 0.25, 0, 3 + 0.5 + 0.225
        (Vote(THREE, rule="normalized", ties="skip"), [1, 1, -1, 0, 1], [2 / 3, 1 / 3, 1, 0, 1]),
        # clip abstains up to 0.02: 2.5 - 2, -0.5 - 0.75, -1 - 0.25, 0, 3 + 0.5 + 0.225
        (
            Vote(THREE, rule="normalized", ties="skip", margins={"clip": 0.02}),
            [1, -1, -1, 0, 1],
            [1 / 3, 2 / 3, 2 / 3, 0, 1],
        ),
    ],
)
def test_votes_by_hand(vote, signs, shares):
    verdict = vote.decide(BALLOT)
    assert verdict.sign.tolist() == signs
    assert verdict.vote_share.tolist() == pytest.approx(shares)


def test_random_voter_is_drawn_by_key_and_seed():
    keys = [f"{i:04d}" for i in range(3000)]
    differences = {"up": torch.ones(3000), "down": -torch.ones(3000), "out": torch.zeros(3000)}
    ballot = Ballot(differences, torch.zeros(3000, dtype=torch.long), keys)
    first = Vote(["up", "down", "out"], rule="random", ties="skip").decide(ballot).sign
    counts = [(first == sign).sum().item() for sign in (1, -1, 0)]
    assert all(900 < count < 1100 for count in counts)  # a third each, within four standard deviations of 26
    for seed in (0, 1):
        drawn = [int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big") % 3 for key in keys]
        verdict = Vote(["up", "down", "out"], rule="random", ties="skip", seed=seed).decide(ballot)
        assert verdict.sign.tolist() == [(1, -1, 0)[voter] for voter in drawn]
        assert verdict.vote_share.tolist() == pytest.approx([(1 / 3, 1 / 3, 0)[voter] for voter in drawn])
    with_human = Vote(["up", "human"], rule="random", ties="skip").decide(ballot._replace(human=ballot.human - 1)).sign
    assert set(with_human.tolist()) == {1, -1}  # the label is drawn as any scorer is
    backwards = Ballot({name: value.flip(0) for name, value in differences.items()}, ballot.human, keys[::-1])
    again = Vote(["up", "down", "out"], rule="random", ties="skip").decide(backwards).sign
    assert torch.equal(again.flip(0), first)


def test_a_weighted_sum_that_rounds_is_a_tie():
    votes = torch.tensor([[1.0, 1.0, -1.0]], dtype=torch.float64)
    assert consensus.majority(votes, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)).tolist() == [0]
    assert 0.1 + 0.2 - 0.3 != 0


def test_raw_scores_are_added_in_double_precision():
    assert consensus.vanilla(torch.tensor([[2.0**25, 1.0, -(2.0**25)]])).tolist() == [1]


def random_ballot(generator, pairs=64):
    """Make scores with many exact ties and many balanced votes."""
    differences = {name: torch.randint(-2, 3, (pairs,), generator=generator).float() for name in FOUR}
    human = torch.randint(-1, 2, (pairs,), generator=generator)
    return Ballot(differences, human, [str(i) for i in range(pairs)], SCALES)


ALL_RULES = [
    Vote(FOUR),
    Vote([*FOUR, "human"], weights={"clip": 1.7, "human": 0.4}, margins={"style": 1.0}),
    Vote(FOUR, rule="unanimous", ties="prefer:sharp"),
    Vote(["clip"], rule="single"),
    Vote(FOUR, rule="random", ties="skip"),
    Vote(FOUR, rule="vanilla", ties="prefer:clip"),
    Vote(FOUR, rule="normalized", margins={"colour": 1.0}),
]


@pytest.mark.parametrize("vote", ALL_RULES, ids=str)
def test_exchanged_images_exchange_the_verdict(vote):
    """Sign symmetry on a thousand random pairs."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(16):
        ballot = random_ballot(generator)
        mirrored = ballot._replace(differences={k: -v for k, v in ballot.differences.items()}, human=-ballot.human)
        first, second = vote.decide(ballot), vote.decide(mirrored)
        assert torch.equal(first.sign, -second.sign)
        assert torch.equal(first.vote_share, second.vote_share)
        assert ((first.vote_share >= 0) & (first.vote_share <= 1)).all()
        assert torch.equal(first.balance, second.balance)
        assert ((first.balance >= 0) & (first.balance <= first.vote_share + 1e-6)).all()


def test_the_balance_counts_abstentions_on_neither_side():
    """3 for; 2 for and 1 against; 1 for and 2 abstaining, a share of 1/3 that does not speak against; 1 to 1; none."""
    differences = {
        "a": torch.tensor([1.0, 1.0, -1.0, 1.0, 0.0]),
        "b": torch.tensor([1.0, 1.0, 0.0, -1.0, 0.0]),
        "c": torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0]),
    }
    verdict = Vote(["a", "b", "c"]).decide(Ballot(differences, torch.ones(5, dtype=torch.long)))
    assert verdict.sign.tolist() == [1, 1, -1, 1, 1]
    assert verdict.balance.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 0, 0])
    weighted = Vote(["a", "b", "c"], weights={"a": 2.0}).decide(Ballot(differences, torch.ones(5, dtype=torch.long)))
    assert weighted.balance.tolist() == pytest.approx([1, 0.5, 0.5, 0.25, 0])


@pytest.mark.parametrize("vote", [vote for vote in ALL_RULES if vote.rule != "random"], ids=str)
def test_the_order_of_voters_does_not_matter(vote):
    generator, shuffle = torch.Generator().manual_seed(1), random.Random(1)
    for _ in range(16):
        ballot = random_ballot(generator)
        voters = shuffle.sample(vote.voters, len(vote.voters))
        permuted = Vote(voters, vote.rule, vote.ties, vote.weights, vote.margins, vote.seed)
        assert torch.equal(vote.decide(ballot).sign, permuted.decide(ballot).sign)


@pytest.mark.parametrize("rule", ["majority", "unanimous"])
def test_only_signs_count(rule):
    """Scaling a scorer changes no vote."""
    ballot = random_ballot(torch.Generator().manual_seed(2))
    scaled = ballot._replace(
        differences={k: v * 10.0 ** (3 * i) for i, (k, v) in enumerate(ballot.differences.items())}
    )
    vote = Vote(FOUR, rule=rule)
    assert torch.equal(vote.decide(ballot).sign, vote.decide(scaled).sign)
    raw = Vote(FOUR, rule="vanilla")
    assert not torch.equal(raw.decide(ballot).sign, raw.decide(scaled).sign)


def test_needed_scorers_include_the_tie_breaker():
    assert Vote(["clip", "human"], ties="prefer:style").scorers == ["clip", "style"]
    assert Vote(FOUR, ties="prefer:clip").scorers == FOUR


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"voters": []}, r"vote\.voters is \[\]"),
        ({"voters": ["a", "a"]}, "each one once"),
        ({"voters": ["human"]}, r"vote\.voters is \['human'\], no scorer among them"),
        ({"voters": ["a"], "rule": "most"}, r"vote\.rule is 'most'; it must be one of majority, unanimous"),
        ({"voters": ["a"], "ties": "a"}, r"vote\.ties is 'a'; it must be human, skip or prefer:SCORER"),
        ({"voters": ["a", "b"], "rule": "single"}, "needs one voter, but vote.voters names 2"),
        ({"voters": ["a", "human"], "rule": "vanilla"}, "voter 'human' has none"),
        ({"voters": ["a"], "weights": {"b": 1.0}}, r"vote\.weights names 'b'"),
        ({"voters": ["a", "human"], "margins": {"human": 1.0}}, r"vote\.margins names 'human'"),
        ({"voters": ["a"], "margins": {"a": -1.0}}, r"vote\.margins: a has -1\.0"),
        ({"voters": ["a"], "weights": {"a": 0.0}}, "so nobody votes"),
        ({"voters": ["a"], "rule": "unanimous", "weights": {"a": 1.0}}, r"vote\.weights only apply to rule majority"),
    ],
)
def test_invalid_votes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Vote(**options)
