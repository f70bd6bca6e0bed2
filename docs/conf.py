"""The documentation's settings for Sphinx: ``tox -e docs`` builds it and takes every warning for an error."""

from kdcore import __version__

project = "kdcore"
author = "The kdcore developers"
release = __version__
html_title = f"kdcore {release}"
html_theme = "furo"
html_static_path: list[str] = []
templates_path: list[str] = []
exclude_patterns = ["_build"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]

# A reference that leads nowhere is a warning.
nitpicky = True
# But for what others document, and for the types and errors of docstrings' tables, which are words.
nitpick_ignore_regex = [
    ("py:.*", r"(numpy|collections|typing|pathlib|torch)\..*"),
    ("py:(class|exc)", r"(?!kdcore\.).*"),
]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what is taken, with shapes
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False  # types are words with shapes, not references

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are kept with what they show; `tox -e notebooks` runs them

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
