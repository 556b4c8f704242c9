"""What Gradio's events need on this page: none lost, none crossing another, none telling of itself
without need."""

from __future__ import annotations

from typing import Any

import gradio as gr

from quantlab.ui.shared import QUIET

LOOK: dict[str, Any] = {**QUIET, "js": "() => window.quantlab.look()"}
"""Settings of an event without a function after which the page is painted anew."""


def keep(demo: gr.Blocks) -> None:
    """Settle all events of the finished page.

    By default Gradio drops an event while another of its kind is on its way. What follows an event
    (`then`) reads the state anew, so that one that waits is enough; events of the page's own markup
    carry what was clicked and wait in the browser (`inLine` in assets/quantlab.js), which is told
    when each has been answered. A second click on a button is dropped, as Gradio does.
    """
    for event in list(demo.fns.values()):
        if event.show_progress == "hidden":
            # Else Gradio tells every output of every event whenever any event starts or ends, and
            # looks each up in the whole page: half of a core in the browser while a run is watched.
            event.show_progress_on = []
        names = {name for _, name in event.targets}
        if event.trigger_after is not None or "input" in names:
            event.trigger_mode = "always_last"
        for target in {demo.blocks.get(id or 0) for id, _ in event.targets}:
            if isinstance(target, gr.HTML):
                demo.default_config.set_event_trigger(
                    [],
                    None,
                    None,
                    None,
                    js=f"() => window.quantlab.answered('{target.elem_id}')",
                    trigger_after=event._id,
                    no_target=True,
                    **QUIET,
                )
