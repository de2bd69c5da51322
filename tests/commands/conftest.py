"""Where the commands run, and a model that several files compare with the base."""

import pytest

from tests.support.exports import darker
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def _in_project(monkeypatch):
    monkeypatch.chdir(ROOT)  # paths in the bundled configs are relative


@pytest.fixture(scope="module")
def dark(tmp_path_factory):
    """Folder with a UNet whose images are darker than the base's."""
    return str(darker(tmp_path_factory.mktemp("models") / "dark"))
