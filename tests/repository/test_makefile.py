"""`make` deletes only what it has made."""

import shutil
import subprocess

import pytest

from tests.support.paths import ROOT


@pytest.fixture
def project(tmp_path):
    """A folder with the Makefile, an environment, a run of make and one of a user."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    files = (".venv/installed", "runs/quickstart/made_by_make", "runs/quickstart/checkpoints/last.ckpt")
    for name in (*files, "runs/mine/checkpoints/last.ckpt", "docs/_build/index.html", "docs/index.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def make(target, folder):
    return subprocess.run(["make", target], cwd=folder, text=True, capture_output=True)


def test_clean_leaves_the_runs_of_a_user(project):
    assert make("clean", project).returncode == 0
    left = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    assert left == {"Makefile", "pyproject.toml", "constraints.txt", "docs/index.md", "runs/mine/checkpoints/last.ckpt"}
    assert make("clean", project).returncode == 0


def test_a_quickstart_does_not_replace_a_run_of_its_name(project):
    (project / "runs/quickstart/made_by_make").unlink()
    done = make("quickstart", project)
    assert done.returncode != 0
    assert "runs/quickstart is a run of yours. Move it away" in done.stdout
    assert (project / "runs/quickstart/checkpoints/last.ckpt").exists()
