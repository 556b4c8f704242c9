"""Questions to the server whose answers paint the same place of the page.

Handlers run at the same time, answers arrive in any order, and Gradio paints each piece by piece:
what stands there in the end may be computed from what the page was. So the browser counts what is
on its way, and where answers have crossed it has the place painted once more (`ask` in
assets/quantlab.js).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantlab.ui.shared import QUIET


def ask(
    place: str,
    listen: Callable[..., Any],
    function: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    **settings: Any,
) -> Any:
    """Connect `function` to an event by `listen` (`slider.input`, `event.then`) and count its
    answers for this place; returns the new event."""
    asked = f"(...all) => {{ window.quantlab?.ask('{place}'); return all; }}"
    told = f"() => window.quantlab?.told('{place}')"
    event = listen(function, inputs, outputs, js=asked, **settings)
    event.then(None, None, None, js=told, **QUIET)
    return event
