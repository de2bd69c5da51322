"""Options and configs of `lit-align test`."""

from pathlib import Path

import pytest
import yaml

from lit_align.cli import main
from lit_align.evaluation.prompts import read_prompts
from tests.support.paths import ROOT
from tests.support.win_rate_tests import read_results, run_test


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": {}}, "models is empty"),
        ({"models": {"base": "x/y"}}, "models: 'base' is what they are compared with"),
        ({"models": {"a/b": "x/y"}}, "models: 'a/b' cannot name a folder"),
        ({"models": {"a": "nowhere"}}, "'nowhere' is neither a checkpoint"),
        ({"base": None}, "Say --base"),
        ({"scorers": "beauty"}, "'beauty' is not in"),
        ({"scorers": ""}, "scorers is empty"),
        ({"tolerances": {"beauty": 1.0}}, "'beauty' is not among the scorers clip, style, colour"),
        ({"tolerances": {"clip": -1.0}}, r"tolerances\.clip is -1.0; it must be 0 or more"),
        ({"tolerances": {"clip": float("inf")}}, r"tolerances\.clip is inf; it must be 0 or more, and finite"),
        ({"names": [""]}, "there is no prompt in"),
        ({"steps": 0}, "steps is 0"),
        ({"prompt_limit": 0}, "prompt_limit is 0"),
        ({"height": 36}, "height is 36; it must be a multiple of 8"),
    ],
)
def test_bad_options_are_named_and_leave_nothing(tmp_path, dark, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_test(tmp_path, dark, **options)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"accuracy": 1}', "its format is None, not 2"),
        ("[1]", "cannot be read: it holds a list, not an object"),
        ('{"format": 1, "made_with": {"options": {}}, "prompts": []}', "its format is 1, not 2"),
        ("fox", "cannot be read"),
    ],
)
def test_results_of_something_else_are_refused(tmp_path, dark, text, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").write_text(text)
    with pytest.raises(ValueError, match=rf"results\.json .*{message}.*Choose another folder"):
        run_test(tmp_path, dark)
    assert (tmp_path / "out/results.json").read_text() == text


CONFIGS = sorted((ROOT / "configs/test").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_config_parses(config, capsys):
    """Every option in the config exists and keeps its value."""
    with pytest.raises(SystemExit) as exit_:
        main(["test", f"--config={config}", "--print_config"])
    assert exit_.value.code in (0, None)
    dumped = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(config.read_text())
    assert {name: dumped[name] for name in written} == written
    assert "Hardware:" in config.read_text()


def test_configs_are_all_here():
    assert [config.stem for config in CONFIGS] == ["emoji", "emoji_balanced_dpo", "partiprompts_sdxl"]


def test_a_config_runs_with_another_model(tmp_path, dark, capsys):
    words = [
        f"--config={ROOT}/configs/test/emoji_balanced_dpo.yaml",
        "--steps=1",
        "--prompt_limit=2",
        "--devices=1",  # a second process would be another pytest
        f"--output={tmp_path}/out",
    ]
    main(["test", *words, "--models", f"{{dark: {dark}}}", f"--cache={tmp_path}/cache"])
    said = capsys.readouterr().out
    assert "2 of 72 prompts; left out: 0 repeated, 0 blank" in said
    assert "a difference of at most: clip 0.004, style 0.4, colour 4" in said
    assert [row["prompt"] for row in read_results(Path(tmp_path) / "out")["prompts"]] == [
        "adhesive bandage",
        read_prompts("emoji").unique[36],
    ]
