"""The comparison of objectives: its numbers computed by hand, its votes, and a training of two steps."""

import pytest
import torch

from benchmarks import alignment_runs as runs
from benchmarks import alignment_tables as tables
from benchmarks import objectives as comparison
from benchmarks.alignment_studies import LADDER, STUDIES, TOLERANCES, next_rate
from lit_align.evaluation.intervals import wilson

BASE = {"scores": {"clip": [0.5, 0.5, 0.5, 0.5], "sharpness": [0.0] * 4}, "in_style": [True, False, False, False]}
BASE |= {"errors": {"chosen": [0.2, 0.4], "rejected": [0.1, 0.1]}, "diversity": 0.8}
FOUND = {"scores": {"clip": [0.6, 0.503, 0.4, 0.5], "sharpness": [2000.0] * 4}, "in_style": [True, True, True, False]}
FOUND |= {"errors": {"chosen": [0.1, 0.5], "rejected": [0.3, 0.3]}, "diversity": 0.4}


def test_numbers_by_hand():
    won = tables.points(FOUND, BASE, TOLERANCES)
    assert won["clip"].tolist() == [1, 0.5, 0, 0.5]  # 0.003 is a tie
    assert won["sharpness"].tolist() == [1, 1, 1, 1]
    assert tables.worth(FOUND, BASE, TOLERANCES, style=True) == pytest.approx((0.75 + 0.5) / 2)
    assert tables.worth(FOUND, BASE, TOLERANCES, style=False) == pytest.approx((0.5 + 1) / 2)
    assert tables.mismatch(BASE) == pytest.approx(3)
    errors = tables.about_errors([FOUND], BASE)
    assert errors == pytest.approx(
        {
            "accuracy": 0.5,
            "accuracy_against_base": 1.0,
            "chosen_drift": 0.0,
            "rejected_drift": 2.0,
            "chosen_worse": 0.5,
            "diversity": 0.5,
        },
        abs=1e-6,  # errors are float32
    )


def test_values_by_seed_and_prompt():
    other = FOUND | {"in_style": [False, False, True, True]}
    values = tables.by_seed_and_prompt([FOUND, other], BASE, TOLERANCES)
    assert values["style"].tolist() == [[1, 1, 1, 0], [0, 0, 1, 1]]
    assert values["macro"].tolist() == 2 * [[1, 0.75, 0.5, 0.75]]
    assert tables.estimate(torch.ones(3, 72)) == [1, *wilson(72, 0, 0)]
    assert tables.estimate(torch.zeros(3, 72)) == [0, *wilson(0, 0, 72)]


def test_intervals_hold_what_they_promise_when_seeds_differ():
    """Values vary by seed, by prompt and by both; an interval over prompts alone would miss the variance of seeds."""
    generator = torch.Generator().manual_seed(0)
    held, widths = 0, []
    for _ in range(200):
        parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 1), (1, 72), (3, 72))]
        _, low, high = tables.estimate(0.03 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2])
        held += low <= 0 <= high
        widths.append(high - low)
    assert 0.92 <= held / 200 <= 1.0
    assert 0.1 < sum(widths) / 200 < 0.3


def test_rates_are_tried_until_the_best_lies_between_two():
    assert next_rate({6e-6: 0.5, 2e-5: 0.6, 6e-5: 0.4}) is None
    assert next_rate({6e-6: 0.6, 2e-5: 0.6, 6e-5: 0.4}) == 2e-6  # of equals the lowest
    assert next_rate({6e-6: 0.5, 2e-5: 0.6, 6e-5: 0.7}) == 2e-4
    assert next_rate({LADDER[-2]: 0.5, LADDER[-1]: 0.6}) is None  # the ladder's end


def test_parts_of_other_settings_are_not_taken_for_these(tmp_path, monkeypatch):
    assert comparison.settings_of(tmp_path) == comparison.settings_of(tmp_path)
    monkeypatch.setattr(runs, "STEPS", runs.STEPS + 1)
    with pytest.raises(ValueError, match=r"was begun with another steps\. Name another folder"):
        comparison.settings_of(tmp_path)


def test_studies_ask_for_what_their_methods_need():
    for study in STUDIES.values():
        for method in study.methods.values():
            objective = method.objective()
            assert not objective.needs_vote or method.vote is not None
            assert method.update_every is None or objective.needs_reference
    votes = {name: method.vote for name, method in STUDIES["votes"].methods.items()}
    assert {name: vote.rule for name, vote in votes.items()} == {
        **dict.fromkeys(("clip", "style", "colour"), "single"),
        "random": "random",
        "vanilla": "vanilla",
        "normalized": "normalized",
        "static": "majority",
        "moving": "majority",
    }


def test_a_training_is_its_seeds_and_moves_the_weights():
    method, pairs = STUDIES["mismatch"].methods["mapo"], STUDIES["mismatch"].pairs
    where = {"train_scores": None, "train_cache": None}
    first, again, other = (runs.train(method, None, pairs, 1e-4, seed, where, steps=2)[0] for seed in (0, 0, 1))
    one, same, different = (backbone.denoiser.conv_in.weight for backbone in (first, again, other))
    assert torch.equal(one, same)
    assert not torch.equal(one, different)
    assert not torch.equal(one, runs.load(None).denoiser.conv_in.weight)


def test_prompts_for_choosing_and_for_measuring_are_apart():
    pairs = STUDIES["mismatch"].pairs
    tuning, held_out = runs.prompts_of(pairs, "tuning"), runs.prompts_of(pairs, "held_out")
    assert (len(tuning), len(held_out)) == (runs.TUNING_PROMPTS, 72)
    assert not set(tuning) & set(held_out)
