"""HTML from the templates in `assets/templates`, every value escaped.

What a model generates and what a person types reach the page through here only, so nothing of it
can run as HTML or script.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from quantlab.plots import palette
from quantlab.plots.words import words

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "templates"


@cache
def environment() -> Environment:
    """The one Jinja environment: autoescaping, and an unknown name is an error."""
    made = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.globals["colour"] = palette.colour
    return made


def render(name: str, language: str | None = None, /, **values: object) -> str:
    """The template `name` filled in; it finds the texts of the language as `say`."""
    return environment().get_template(name).render(say=words(language), **values).strip()
