"""The site: `python -m sphinx -W docs site` writes it, and runs its notebooks."""

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import mh_lightning

project = "mh_lightning"
author = "the mh_lightning developers"
copyright = f"{author}; MIT licence"
version = release = mh_lightning.__version__

extensions = [
    "myst_nb",  # Markdown, and notebooks as Markdown, run while the site is built
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_templates"]
templates_path = ["_templates"]
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_title = "mh_lightning"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "exclude-members": "set_fit_request, set_partial_fit_request, set_predict_request, set_score_request",
}
autosummary_ignore_module_all = False
default_role = "py:obj"
napoleon_use_ivar = True
copybutton_exclude = ".linenos, .gp, .go"


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def _keep_symbols(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """An argument that is described by its symbol alone, as "n.", is not an item of a list."""
    lines[:] = [re.sub(r"^(\s+\w+: \w)\.(?= |$)", r"\1\\.", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Formulas are MathML, which browsers draw without a script and without a network."""
    app.connect("autodoc-process-docstring", _keep_symbols, priority=400)  # before napoleon
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
