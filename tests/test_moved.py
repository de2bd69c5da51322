"""Old import paths work for one release, with a warning."""

import sys
from importlib import import_module

import pytest
import yaml

from lit_align.cli import main
from lit_align.moved import MOVED
from tests.support.paths import ROOT


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_path_forwards_to_the_new_module(old, new):
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=rf"{old} has moved to {new}; the old path goes in the next release"):
        moved = import_module(old)
    public = [name for name in vars(import_module(new)) if not name.startswith("_")]
    assert len(public) > 3
    assert all(getattr(moved, name) is getattr(import_module(new), name) for name in public)
    with pytest.raises(AttributeError):
        moved.nothing  # noqa: B018


def test_only_moved_modules_are_found():
    with pytest.raises(ModuleNotFoundError):
        import_module("lit_align.never_there")


def test_a_config_with_an_old_class_path_still_parses(tmp_path, capsys):
    sys.modules.pop("lit_align.fsdp2", None)
    config = yaml.safe_load((ROOT / "configs/mapo_sdxl.yaml").read_text())
    config["trainer"]["strategy"] = {"class_path": "lit_align.fsdp2.FSDP2"}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(config))
    with pytest.warns(FutureWarning, match="lit_align.fsdp2 has moved"), pytest.raises(SystemExit):
        main(["fit", f"--config={tmp_path / 'old.yaml'}", "--print_config"])
    assert "lit_align.fsdp2.FSDP2" in capsys.readouterr().out
