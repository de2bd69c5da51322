"""Intervals and win rates: compared with values of scipy 1.17.1, by hand, and by simulated coverage.

scipy is not installed for the tests: torchmetrics would import it in every process that trains, 1.5 CPU seconds each.
"""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from lit_align.evaluation import intervals
from lit_align.evaluation.intervals import bootstrap, score_interval, sign_test, wilson
from lit_align.evaluation.prompts import prompt_seed
from lit_align.evaluation.report.page import make_templates
from lit_align.evaluation.tables import compare_all, overview, to_text
from lit_align.evaluation.win_rates import compare

# binomtest(wins, wins + losses), its proportion_ci(0.95, "wilson") and its pvalue
SCIPY = [
    (0, 1, 0.0, 0.7934506856227626, 1.0),
    (0, 30, 0.0, 0.11351339317396875, 1.862645149230957e-09),
    (7, 3, 0.39677814746114526, 0.892208732593699, 0.34375),
    (36, 36, 0.3874709230948976, 0.6125290769051024, 1.0),
    (50, 22, 0.5804575204088858, 0.7887336902480473, 0.0012935849626762883),
    (1, 499, 0.00035313639455927456, 0.011240706705146757, 3.061046236226604e-148),
    (1632, 0, 0.9976516924669073, 1.0, 0.0),
]


@pytest.mark.parametrize(("wins", "losses", "low", "high", "p"), SCIPY)
def test_wilson_without_ties_and_sign_test_are_scipys(wins, losses, low, high, p):
    assert wilson(wins, 0, losses) == pytest.approx((low, high), abs=1e-12)
    assert sign_test(wins, losses) == pytest.approx(p, rel=1e-9)


def test_wilson_with_ties_inverts_the_score_test():
    """Each end is 1.96 standard errors, computed at that end, away from the rate."""
    wins, ties, losses = 40, 20, 12
    n, z2 = 72, NormalDist().inv_cdf(0.975) ** 2
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
    """Means of skewed values, whose true mean is 1."""
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)  # the default would take minutes
    torch.manual_seed(2)
    covered = 0
    for _ in range(500):
        low, high = bootstrap(torch.distributions.Gamma(4.0, 4.0).sample((n,)))
        covered += low <= 1 <= high
    assert 0.93 <= covered / 500 <= 0.97


def test_bootstrap_agrees_with_scipys_and_with_itself():
    """The width of stats.bootstrap((values,), mean, method="basic", rng=default_rng(0))."""
    values = torch.arange(200, dtype=torch.float64).square()
    ours = bootstrap(values)
    assert ours.high - ours.low == pytest.approx(3234.7995, rel=0.05)
    assert bootstrap(values) == ours


@pytest.mark.parametrize("n", [2, 5, 40])
def test_bootstrap_widens_what_resampling_understates(n):
    """Around the mean, by sqrt(n / (n - 1)): with as many draws of prompts, numpy's quantiles give the plain ends."""
    values = torch.arange(n, dtype=torch.float64).square()
    generator = torch.Generator().manual_seed(0)
    rounds = [torch.randint(n, (intervals.RESAMPLES // 10, n), generator=generator) for _ in range(10)]
    ends = np.quantile(values.numpy()[torch.cat(rounds).numpy()].mean(1), [0.025, 0.975])
    mean = (n - 1) * (2 * n - 1) / 6
    assert bootstrap(values) == pytest.approx(mean + (ends - mean) * math.sqrt(n / (n - 1)), rel=1e-9)


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
    assert found.macro_interval == score_interval(0.4375, (3 * 0.25 + 0.25 * 0.75) / 4, 4)
    assert (found.macro_wins, found.macro_ties, found.macro_losses, found.macro_sign_test) == (0, 3, 1, 1.0)
    turned = compare(other, mine, {"a": 0.25})
    assert turned.macro == pytest.approx(1 - found.macro)
    assert math.isclose(turned.scorers["b"].difference, -b.difference)


def test_differences_are_taken_in_double_precision():
    found = compare({"a": torch.tensor([2.0**24])}, {"a": torch.tensor([-1.0])}).scorers["a"]
    assert found.difference == 2**24 + 1


def test_a_macro_interval_is_as_wide_as_its_prompts_allow():
    """3 of 3 wins decide little; scorers that always disagree count as ties; ends stay within 0 and 1."""
    base, wins = torch.zeros(3), torch.ones(3)
    assert compare({"a": wins, "b": wins}, {"a": base, "b": base}).macro_interval == wilson(3, 0, 0)
    assert compare({"a": wins, "b": -wins}, {"a": base, "b": base}).macro_interval == wilson(0, 3, 0)
    nearly = torch.ones(24)
    nearly[0] = -1
    assert compare({"a": nearly}, {"a": torch.zeros(24)}).macro_interval == wilson(23, 0, 1)
    assert 0 < wilson(23, 0, 1).low < wilson(23, 0, 1).high < 1


@pytest.mark.parametrize("n", [72, 200, 500])
@pytest.mark.parametrize("shift", [0.0, 0.4, 0.9])
@pytest.mark.parametrize(("scorers", "correlation"), [(2, 0.3), (3, 0.3), (3, 0.8)])
def test_macro_covers_in_95_of_100_samples(n, shift, scorers, correlation):
    """The scorers agree in part, and at least a tenth of the prompts are ties."""
    torch.manual_seed(3)
    samples = 3000

    def averages(*shape):
        """Simulate prompts: (*shape) means over scorers of 0, 1/2 and 1."""
        common = torch.randn(*shape, 1, dtype=torch.float64) * math.sqrt(correlation)
        own = torch.randn(*shape, scorers, dtype=torch.float64) * math.sqrt(1 - correlation)
        values = common + own + shift
        return ((values.sign() * (values.abs() > 0.15)) + 1).mean(-1) / 2

    one = torch.distributions.Normal(torch.tensor(shift, dtype=torch.float64), 1.0)
    true = float(1 - one.cdf(torch.tensor(0.15)) + (one.cdf(torch.tensor(0.15)) - one.cdf(torch.tensor(-0.15))) / 2)
    drawn = averages(samples, n)
    means, deficits = drawn.mean(1).tolist(), (drawn * (1 - drawn)).mean(1).tolist()
    found = [score_interval(mean, deficit, n) for mean, deficit in zip(means, deficits, strict=True)]
    covered = sum(low <= true <= high for low, high in found) / samples
    assert 0.93 <= covered <= 0.97


def test_of_one_prompt_the_difference_has_no_interval():
    found = compare({"a": torch.tensor([2.0])}, {"a": torch.tensor([1.0])})
    assert found.scorers["a"].difference == 1
    assert found.scorers["a"].difference_interval is None
    assert found.macro_interval == wilson(1, 0, 0)
    (comparison,) = compare_all({"a": {"base": [1.0], "new": [2.0]}}, {})
    assert "unknown" in to_text(comparison, 1)
    assert "unknown" in make_templates().get_template("sections.html").module.summary(0, comparison)


def test_tables_of_the_terminal():
    """The macro row counts prompts by the majority of scorers; the overview lists only models against the base."""
    scores = {"a": {"base": [0.0, 0.0], "x": [1.0, 1.0], "y": [1.0, -1.0]}}
    scores["b"] = {"base": [0.0, 0.0], "x": [1.0, -1.0], "y": [-1.0, -1.0]}
    comparisons = compare_all(scores, {})
    macro = to_text(comparisons[0], 2).splitlines()[-1].split()
    assert macro[:5] == ["macro", "1", "1", "0", "75.0%"]
    assert macro[-2:] == ["p", "1"]
    assert [line.split() for line in overview(comparisons, "base").splitlines()[1:]] == [
        ["model", "macro", "a", "b"],
        ["x", "75.0%", "100.0%", "50.0%"],
        ["y", "25.0%", "50.0%", "0.0%"],
    ]
    assert overview(comparisons[:1], "base") == ""


@pytest.mark.parametrize(
    ("tolerances", "message"),
    [
        ({"c": 0.1}, "'c' is not a scorer"),
        ({"a": -1.0}, r"tolerances\.a is -1.0; it must be 0 or more"),
        ({"a": math.inf}, "finite"),
    ],
)
def test_wrong_tolerances_are_named(tolerances, message):
    scores = {"a": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        compare(scores, scores, tolerances)


def test_noise_is_the_prompts_own():
    assert prompt_seed("fox", 0) == prompt_seed("fox", 0) < 2**32
    assert len({prompt_seed(prompt, seed) for prompt in ("fox", "cat") for seed in (0, 1)}) == 4
