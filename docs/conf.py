"""The website: the whole checkout is Sphinx's source folder, so a link between two files works on
GitHub and here alike. `make site` builds it, without a network and without running a notebook."""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs/_ext")]

import paperlib  # noqa: E402

project = "paperlib"
author = copyright = "the paperlib authors"
version = release = paperlib.__version__
language = "en"

root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/**", "results/README.md"]
exclude_patterns = [".*", "build", "runs", "figures", "local", "**.ipynb_checkpoints", "docs/_*"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "plain_docstrings",
    "provenance",
]

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # else a page with widgets loads scripts from elsewhere
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

highlight_language = "none"  # of blocks in docstrings that name no language
default_role = "py:obj"  # `name` in a docstring is a link where there is such a name
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autosummary_ignore_module_all = False
napoleon_numpy_docstring = False

templates_path = [str(ROOT / "docs/_templates")]
html_theme = "furo"
html_theme_options = {"top_of_page_buttons": []}
pygments_dark_style = "a11y-high-contrast-dark"
html_copy_source = False
html_title = "paperlib"
# MathJax as one file without fonts, instead of the address that Sphinx has for it.
MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
html_static_path = ["_static", str(MATHJAX / "tex-svg-full.js")]
mathjax_path = "tex-svg-full.js"
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_additional_pages = {"index": "redirect.html"}
