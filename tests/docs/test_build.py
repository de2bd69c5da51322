"""The pages build without a warning, as `make docs` does it."""

import subprocess
import sys

import pytest

from tests.support.paths import ROOT


def test_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", ROOT / "docs", tmp_path / "html"]
    subprocess.run([*command, "-d", tmp_path / "doctrees"], cwd=ROOT, check=True)
    assert len(list((tmp_path / "html").glob("*.html"))) >= 18
    assert "beta_mapo" in (tmp_path / "html/python-api.html").read_text()
