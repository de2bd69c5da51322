"""Settings of Sphinx for the pages in this folder: `make docs` builds them, and a warning is an error."""

import re
from typing import Any

from lit_align import __version__

project = "lit-align"
author = "the authors of lit-align"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lit-align {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]
default_role = "code"  # docstrings quote names with single backticks

myst_heading_anchors = 3  # links such as training.md#checkpoints

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of Lightning refer to its own pages
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_rtype = False

OUTSIDE = re.compile(r"\]\((\.\./[^)#]+\.md)\)")
HEADER = re.compile(r"(Args|Returns|Raises|Yields):$")


def link_outside(app: Any, name: str, source: list[str]) -> None:
    """Make links to Markdown files outside this folder downloads: MyST looks for pages of that name."""
    source[0] = OUTSIDE.sub(r"](path:\1)", source[0])


def keep_formulas(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make indented paragraphs of docstrings literal blocks, which hold formulas and tables."""
    kept: list[str] = []
    inside = False
    for line in lines:
        indented = line.startswith("    ")
        after = next((other for other in reversed(kept) if other), "")
        if indented and kept and not kept[-1] and not inside and not after.startswith(" ") and not HEADER.match(after):
            kept += ["::", ""]
            inside = True
        elif line and not indented:
            inside = False
        kept.append(line)
    lines[:] = kept


def setup(app: Any) -> None:
    """Connect both to Sphinx, the second one before napoleon."""
    app.connect("source-read", link_outside)
    app.connect("autodoc-process-docstring", keep_formulas, priority=100)
