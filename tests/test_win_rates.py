"""Intervals and win rates: against scipy, by hand, and by how often they hold what they promise."""

import math

import pytest
import torch
from scipy import stats

from lit_align.evaluation import intervals
from lit_align.evaluation.intervals import bootstrap, sign_test, wilson
from lit_align.evaluation.noise import prompt_seed
from lit_align.evaluation.win_rates import compare


@pytest.mark.parametrize(("wins", "losses"), [(0, 1), (0, 30), (7, 3), (36, 36), (50, 22), (1, 499), (1632, 0)])
def test_wilson_without_ties_and_sign_test_are_scipys(wins, losses):
    test = stats.binomtest(wins, wins + losses)
    low, high = test.proportion_ci(0.95, "wilson")
    assert wilson(wins, 0, losses) == pytest.approx((low, high), abs=1e-12)
    assert sign_test(wins, losses) == pytest.approx(test.pvalue, rel=1e-9)


def test_wilson_with_ties_inverts_the_score_test():
    """At both ends of the interval the rate lies 1.96 standard errors off, as computed at that end."""
    wins, ties, losses = 40, 20, 12
    n, z2 = 72, stats.norm.ppf(0.975) ** 2
    share = ties / (n + z2)
    for end in wilson(wins, ties, losses):
        assert ((50 / n - end) ** 2) == pytest.approx(z2 * (end * (1 - end) - share / 4) / n, rel=1e-9)


def test_intervals_at_the_edges():
    assert wilson(0, 0, 5).low == 0
    assert wilson(5, 0, 0).high == 1
    ties = wilson(0, 72, 0)
    assert ties.high - 0.5 == pytest.approx(0.5 - ties.low)
    assert ties.high - ties.low == pytest.approx(1 - wilson(72, 0, 0).low)
    assert wilson(3, 0, 7).low == pytest.approx(1 - wilson(7, 0, 3).high)
    with pytest.raises(ValueError, match="at least one prompt"):
        wilson(0, 0, 0)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap(torch.tensor([]))


@pytest.mark.parametrize("n", [72, 200, 500])
@pytest.mark.parametrize(("win", "tie"), [(0.5, 0.0), (0.4, 0.2), (0.3, 0.4), (0.2, 0.6), (0.7, 0.0), (0.85, 0.05)])
def test_wilson_covers_in_95_of_100_samples(n, win, tie):
    torch.manual_seed(1)
    shares = torch.tensor([win, tie, 1 - win - tie], dtype=torch.float64)
    samples = torch.distributions.Multinomial(n, shares).sample((3000,)).long().tolist()
    found = [wilson(*sample) for sample in samples]
    covered = sum(low <= win + tie / 2 <= high for low, high in found) / len(samples)
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("n", [40, 72])
def test_bootstrap_covers_in_95_of_100_samples(n, monkeypatch):
    """Of the mean of skewed values, whose true mean is 1."""
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)  # or it takes minutes
    torch.manual_seed(2)
    covered = 0
    for _ in range(500):
        low, high = bootstrap(torch.distributions.Gamma(4.0, 4.0).sample((n,)))
        covered += low <= 1 <= high
    assert 0.93 <= covered / 500 <= 0.97


def test_bootstrap_agrees_with_scipys_and_with_itself():
    values = torch.distributions.Gamma(4.0, 4.0).sample((200,)).double()
    ours, theirs = bootstrap(values), stats.bootstrap((values.numpy(),), lambda x, axis: x.mean(axis), method="basic")
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.high - ours.low == pytest.approx(width, rel=0.05)
    assert bootstrap(values) == ours


def test_compare_by_hand():
    mine = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([0.0, 0.0, 0.0, 1.0])}
    other = {"a": torch.tensor([0.0, 2.0, 3.25, 5.0]), "b": torch.tensor([1.0, 1.0, 0.0, 0.0])}
    found = compare(mine, other, {"a": 0.25})
    a, b = found.scorers["a"], found.scorers["b"]
    assert (a.wins, a.ties, a.losses, a.win_rate) == (1, 2, 1, 0.5)
    assert (b.wins, b.ties, b.losses, b.win_rate) == (1, 1, 2, 0.375)
    assert (a.mean, a.mean_against, a.difference) == (2.5, 2.5625, -0.0625)
    assert a.interval == wilson(1, 2, 1)
    assert (a.sign_test, b.sign_test) == (1.0, 1.0)
    assert found.macro == pytest.approx(0.4375)
    assert found.macro_interval == bootstrap(torch.tensor([0.5, 0.25, 0.5, 0.5]))
    turned = compare(other, mine, {"a": 0.25})
    assert turned.macro == pytest.approx(1 - found.macro)
    assert math.isclose(turned.scorers["b"].difference, -b.difference)


def test_a_macro_average_stays_between_0_and_1():
    base = torch.zeros(24)
    nearly = torch.ones(24)
    nearly[0] = -1
    found = compare({"a": nearly}, {"a": base})
    assert found.macro_interval.high == 1
    assert bootstrap((nearly + 1) / 2).high > 1


@pytest.mark.parametrize(
    ("tolerances", "message"), [({"c": 0.1}, "'c' is no scorer"), ({"a": -1.0}, "of a is -1.0; it must be 0 or more")]
)
def test_wrong_tolerances_are_named(tolerances, message):
    scores = {"a": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        compare(scores, scores, tolerances)


def test_noise_is_the_prompts_own():
    assert prompt_seed("fox", 0) == prompt_seed("fox", 0) < 2**32
    assert len({prompt_seed(prompt, seed) for prompt in ("fox", "cat") for seed in (0, 1)}) == 4
