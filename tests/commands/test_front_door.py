"""The front door: all commands at a glance, without the libraries that they need."""

import gc
import os
import subprocess
import sys
from importlib import import_module

import pytest

from lit_align import __version__
from lit_align.__main__ import see_working_directory
from lit_align.cli import COMMANDS, GROUPS, check_configs, load, main
from lit_align.commands.completion import completion_script
from lit_align.commands.export import export
from lit_align.user_errors import UserValueError
from tests.support.paths import ROOT

HEAVY = ("torch", "lightning", "diffusers", "transformers", "jsonargparse", "pyarrow")


def python(code, *words):
    """Run Python code in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["--version"]])
def test_a_glance_imports_no_library(words):
    code = f"from lit_align.__main__ import main; main(); import sys; print([n for n in {HEAVY} if n in sys.modules])"
    result = python(code, *words)
    assert result.returncode == 0, result.stderr
    *text, imported = result.stdout.splitlines()
    assert imported == "[]"
    if words == ["--version"]:
        assert text == [f"lit-align {__version__}"]
    else:
        titles = [f"{group}:" for group in GROUPS]
        assert [line for line in text if line in titles] == titles
        assert [line.split()[0] for line in text if line.startswith("  ")] == list(COMMANDS)


@pytest.mark.parametrize(
    "command", ["export", "inspect", "import folder", "score", "generate", "predict", "test", "completion bash"]
)
def test_help_of_a_command_imports_no_library_that_it_does_not_need(command):
    code = f"""
import sys
from lit_align.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print([name for name in {HEAVY[:4]} if name in sys.modules])
"""
    result = python(code, *command.split(), *([] if command.startswith("completion") else ["--help"]))
    assert result.returncode == 0, result.stderr
    *text, imported = result.stdout.splitlines()
    assert text
    assert imported == "[]"


def test_imports_of_a_command_are_not_searched_for_garbage():
    code = """
import gc
from lit_align.cli import load
gc.callbacks.append(lambda phase, info: print("search"))
load("inspect")
gc.callbacks.clear()
print(gc.isenabled(), gc.get_freeze_count() > 10_000)
"""
    assert python(code).stdout == "True True\n"


def test_a_command_in_a_running_program_keeps_no_garbage():
    before = gc.get_freeze_count()
    load("export")
    assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_every_line_fits_a_terminal(capsys):
    main([])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 90


@pytest.mark.parametrize(("text", "message"), [("a: [1", "no valid YAML"), ("- a", "must be a mapping")])
@pytest.mark.parametrize("form", ["--config={}", "--config {}"])
def test_a_file_that_is_no_config_is_named(tmp_path, text, message, form):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserValueError, match=rf"mine\.yaml.*{message}"):
        check_configs(form.format(path).split())


def test_fit_help_begins_with_our_own_options(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "example: lit-align fit --config configs/" in text[:400]
    first = [text.index(option) for option in ("--model.objective", "--model.backbone", "--data.train_shards")]
    assert max(first) < text.index("--trainer.accelerator")


@pytest.fixture(scope="module")
def bash_script():
    commands = {"export": ("write weights", export), "import": ("make shards", {"folder": export}), "fit": ("", None)}
    return completion_script(commands, "bash")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lit-align ex", {"export"}),
        ("lit-align export --out", {"--output"}),
        ("lit-align export --precision f", {"fp32", "fp16"}),
        ("lit-align import fol", {"folder"}),
        ("lit-align fit --con", {"--config"}),
    ],
)
def test_bash_completes(bash_script, words, expected):
    last = len(words.split()) - 1
    ask = f"COMP_WORDS=({words}); COMP_CWORD={last}; COMP_TYPE=9; _shtab_lit_align; echo ${{COMPREPLY[@]}}"
    result = subprocess.run(["bash", "-c", f"{bash_script}\n{ask}"], capture_output=True, text=True, timeout=60)
    assert set(result.stdout.split()) == expected, result.stderr


def test_completion_has_all_commands(capsys):
    main(["completion", "bash"])
    script = capsys.readouterr().out
    assert f"_shtab_lit_align_subparsers=({' '.join(COMMANDS)})" in script
    assert "--chosen_prefix" in script


def test_completion_of_another_shell_is_refused():
    with pytest.raises(UserValueError, match="'fish'; choose from bash, zsh, tcsh"):
        completion_script({}, "fish")


def test_the_working_directory_is_seen(tmp_path, monkeypatch):
    """As by `python -m lit_align`, but last; `python -P` turns it off."""
    (tmp_path / "mine_alone.py").write_text("class MyObjective: ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    see_working_directory()
    see_working_directory()
    assert sys.path[-1] == str(tmp_path)
    assert sys.path.count(str(tmp_path)) == 1
    assert import_module("mine_alone").MyObjective
