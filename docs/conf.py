"""Settings of Sphinx for the pages in this folder: `make docs` builds them, and a warning is an error."""

from lit_align import __version__

project = "lit-align"
author = "the authors of lit-align"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lit-align {release}"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # links such as training.md#checkpoints

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_use_rtype = False
nitpicky = False  # types of torch and Lightning have no page here
