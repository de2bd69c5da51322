"""The scripts that measure the code and walk through the pages."""

import pytest

from scripts import structure, walk

FILES = {
    "__init__.py": "",
    "a.py": "import package.b\n",
    "b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package import a\n",
    "c.py": "from package import a\ndef f():\n    '''One\n\n    two.'''\n    from package import c\n    return 1\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of four files, two of which import each other under TYPE_CHECKING."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        path = tmp_path / "package" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return "package"


def test_measures_of_a_small_package(package, capsys):
    structure.main(package, package)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(None, 1)[1] == "4, 11 lines"
    assert lines[1].split("file ")[1].startswith("2 / ")
    assert lines[2].split() == ["functions", "1"]
    assert lines[3].endswith("3 / 3 / 3 (package/c.py:f)")  # without the docstring
    assert lines[4].split() == ["import", "cycles", "1"]
    assert lines[5].split() == ["package.a", "package.b"]  # an import inside a function is none
    assert lines[6].endswith("11 / 11 = 1.00")


def test_blocks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n```bash\nls\n```\n```text\nno\n```\n```bash\n# needs a GPU\nnvidia-smi\n```\n")
    first, second = walk.blocks(page)
    assert (first.line, first.script, first.needs) == (2, "ls\n", "")
    assert (second.line, second.needs) == (8, "a GPU")
