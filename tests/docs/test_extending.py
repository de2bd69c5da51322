"""The files in docs/extending do what their page says."""

import importlib
import json
import shutil
import sys

import pytest
import torch
import yaml

from lit_align.data.importers.import_run import import_source
from lit_align.data.shards.index import INDEX
from lit_align.scoring.presets import load_scorers
from lit_align.types import PairErrors
from tests.support.paths import ROOT
from tests.support.pipelines import write_stable_diffusion
from tests.support.runs import KeepLogs, fit, make_data, make_module

EXTENDING = ROOT / "docs/extending"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXTENDING))


def load(name):
    return importlib.import_module(name)


def test_objective_by_hand_and_in_a_run(tmp_path):
    objective = load("hinge_gap").HingeGap(gap=0.05, hinge_weight=2.0)
    policy = PairErrors(torch.tensor([0.10, 0.10]), torch.tensor([0.12, 0.30]))
    output = objective(policy, None)
    torch.testing.assert_close(output.losses, torch.tensor([0.10 + 2.0 * 0.03, 0.10]))
    torch.testing.assert_close(output.margin, torch.tensor([0.02, 0.20]))
    logs = KeepLogs()
    fit(make_module(objective=objective), make_data(), tmp_path, 1, logger=logs, log_every_n_steps=1)
    assert "train/loss/hinge" in {name for _, values in logs.rows for name in values}


def test_scorer_by_hand_and_from_its_presets():
    (scorer,) = load_scorers(["brightness"], EXTENDING / "brightness.yaml").values()
    images = [torch.full((3, 4, 4), value, dtype=torch.uint8) for value in (0, 51, 255)]
    expected = torch.tensor([0.0, 0.2**2.2, 1.0])
    torch.testing.assert_close(scorer.score(images, ["a", "b", "c"]), expected)
    assert scorer.fingerprint() != load("brightness").Brightness(gamma=1.0).fingerprint()
    assert set(yaml.safe_load((EXTENDING / "brightness.yaml").read_text())) == {"brightness"}


def test_backbone_conditions_on_another_layer_and_trains(tmp_path):
    repo, clip_skip = write_stable_diffusion(tmp_path / "sd", "epsilon"), load("clip_skip").ClipSkip
    skipping = make_module(repo=repo, backbone=clip_skip)
    plain = make_module(repo=repo, backbone=clip_skip.__mro__[1])
    for module in (skipping, plain):
        module.backbone.load_encoders()
    hidden = [module.backbone.encode_prompts(["a red fox"])["hidden"] for module in (skipping, plain)]
    assert hidden[0].shape == hidden[1].shape
    assert not torch.allclose(*hidden)
    assert skipping.backbone.prompts_identity() != plain.backbone.prompts_identity()
    assert fit(skipping, make_data(), tmp_path, 1).global_step == 1


def test_importer_makes_pairs_ties_and_rejects(tmp_path):
    run = load("import_votes")
    images = ROOT / "assets/emoji/before-after.png", ROOT / "benchmarks/balanced_dpo.png"
    for number, image in enumerate(images):
        shutil.copy(image, tmp_path / f"{number}.png")
    names = ["0.png", "1.png"]
    rows = [{"prompt": "a", "images": names, "votes": votes} for votes in ([3, 1], [2, 2], [1, 0])]
    path = tmp_path / "votes.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    summary = import_source(run.Votes(path), str(tmp_path / "pairs"), 1000, 1)
    assert (summary.pairs, summary.ties, summary.rejects) == (1, 1, {"fewer than 3 votes": 1})
    assert (tmp_path / "pairs" / INDEX).is_file()


def test_files_are_short():
    files = sorted(EXTENDING.glob("*.py"))
    assert [path.name for path in files] == ["brightness.py", "clip_skip.py", "hinge_gap.py", "import_votes.py"]
    for path in files:
        code = [
            line for line in path.read_text().splitlines() if line.strip() and not line.startswith(("import", "from"))
        ]
        assert len(code) <= 45, path.name
        assert path.stem not in sys.stdlib_module_names
