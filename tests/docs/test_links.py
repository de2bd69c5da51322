"""Links and anchors of the pages lead somewhere, and shell blocks are run or say what they need."""

import re
from pathlib import Path

import pytest

from scripts.walk import ROOT, blocks, pages

TOP = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*TOP, *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
FILE = re.compile(
    r"(?<!\} )(?<![/\w])((?:tests|configs|scripts|examples|benchmarks|assets|notebooks|docs)/[\w./-]*[\w])"
)
SHELL = ("console", "shell", "sh", "zsh")  # all shell blocks are `bash`, so that none is overlooked


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_files_that_the_pages_name_are_there():
    named = {path for page in PAGES for path in FILE.findall(page.read_text())} - {"docs/_build"}  # made by make docs
    assert len(named) >= 40
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_all_links_were_found():
    links = [link for page in PAGES for link in LINK.findall(CODE.sub("", page.read_text()))]
    assert len(PAGES) >= 19
    assert len(links) >= 60


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^[a-z-]+$", (ROOT / "docs/index.md").read_text(), re.M))
    assert listed == {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}


def test_shell_blocks_run_or_say_what_they_need():
    found = [block for page in pages() for block in blocks(page)]
    not_run = [block for block in found if block.needs]
    assert (len(found) - len(not_run), len(not_run)) == (26, 24)  # run, not run: say so in the page and here
    for page in pages():
        languages = re.findall(r"^```(\w+)", page.read_text(), re.M)
        assert not set(languages) & set(SHELL), f"{page.name}: name shell blocks `bash`"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
