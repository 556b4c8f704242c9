"""The states that all tabs share, the translator of labels, and small pieces of set-up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from quantlab.plots.words import translations

TRANSLATOR = gr.I18n(**translations())


def i18n(key: str) -> Any:
    """A label, info or placeholder of Gradio's own components, translated in the browser."""
    return TRANSLATOR(key)


QUIET: dict[str, Any] = {
    "queue": False,
    "show_progress": "hidden",
    "api_visibility": "private",
}
"""Settings of events that answer in milliseconds and must not flicker. Outside of the queue, a
`change` of a State that such an event fills is not noticed by the browser: use BUSY for those."""

BUSY: dict[str, Any] = {
    "concurrency_limit": None,
    "show_progress": "hidden",
    "api_visibility": "private",
}
"""Settings of events that may take a moment; many may run at the same time."""


def call(code: str) -> str:
    """`js_on_load` that runs `code` as soon as assets/quantlab.js is there."""
    return f"const go = () => window.quantlab ? (() => {{ {code} }})() : setTimeout(go, 20); go();"


def html(
    elem_id: str, code: str | None = None, events: tuple[str, ...] = (), **options: Any
) -> Any:
    """A gr.HTML for the page's own markup. `events` are those its script triggers, by name."""
    named = f"/* {' '.join(repr(event) for event in events)} */ " if events else ""
    if events:  # One after another; `order.keep` tells it when each is answered.
        code = f"trigger = quantlab.inLine('{elem_id}', trigger); {code}"
    return gr.HTML(
        options.pop("value", ""),
        elem_id=elem_id,
        js_on_load=named + call(code) if code else None,
        apply_default_css=False,
        **options,
    )


WANTED = "tokens wanted"
"""A mark beside the fingerprints: the paired token view was opened in this browser tab."""


@dataclass
class Shared:
    """`client`: a Client; `run_id`: the run in view ('' for none); `painted`: fingerprints of what
    this browser tab shows, by piece; `fork`: what the fork explorer shows, as its buttons name it;
    `opened`: whether the paired token view was opened, which no tick may forget that began before.
    After each event of `repaint` the page is painted anew."""

    client: gr.State
    run_id: gr.State
    painted: gr.State
    fork: gr.State
    opened: gr.State
    repaint: list[Any] = field(default_factory=list)
