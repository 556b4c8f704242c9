"""Short messages beside the controls they are about."""

from __future__ import annotations

from typing import Literal

from quantlab.errors import QuantLabError
from quantlab.plots.templates import render
from quantlab.plots.words import words

SWITCHES = ("--allow-pickle", "--trust-remote-code")
"""Options that errors name as the command line writes them; the page has switches for them."""


def message(
    text: str, language: str, kind: Literal["error", "note"] = "note", hint: str | None = None
) -> str:
    return render("message.html", language, text=text, kind=kind, hint=hint)


def error_message(error: QuantLabError, language: str) -> str:
    """What went wrong and what to try, as an alert."""
    hint = error.hint
    if hint is None and any(flag in str(error) for flag in SWITCHES):
        hint = words(language)("hint_switch")
    return message(str(error), language, "error", hint)
