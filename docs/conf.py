"""Settings of the docs; ``sphinx-build -W -b html docs docs/_build`` needs no network."""

from __future__ import annotations

import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"

project = "django-dbhealth"
version = release = tomllib.loads(PYPROJECT.read_text())["project"]["version"]

extensions = ["myst_parser"]
exclude_patterns = ["_build"]

# docutils' own slugs: "django_dbhealth.W003" becomes #django-dbhealth-w003, as the hints say.
myst_heading_anchors = 3
myst_heading_slug_func = "docutils.nodes.make_id"

html_theme = "furo"
html_title = f"django-dbhealth {version}"
