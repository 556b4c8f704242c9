"""Which tensors the walkthroughs are computed on: the shipped slices, or those of another model.

Taking a model's slices is a process of its own (`quantlab.learn.capture`) with progress and
cancel; this is its control panel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from quantlab.errors import QuantLabError
from quantlab.learn import material
from quantlab.plots.templates import render
from quantlab.ui.captures import POLL, captures, progress_html
from quantlab.ui.client import Client
from quantlab.ui.messages import error_message, message
from quantlab.ui.shared import BUSY, QUIET, Shared, html, i18n
from quantlab.ui.views import model_name

MODULE = "quantlab.learn.capture"


@dataclass
class Source:
    """`chosen` is {"file": path or '' for what ships, "layer": name or ''}; `changed` are events
    after which it is another one, beside its own change when a model was read."""

    chosen: Any
    origin: Any
    changed: list[Any] = field(default_factory=list)


def build_source(shared: Shared) -> Source:
    """A line that says what is shown, and behind it the choice of another layer or model."""
    chosen = gr.State({"file": "", "layer": ""})
    first = {"file": "", "layer": ""}
    with gr.Row(elem_id="learn-source", equal_height=False):
        origin = html("learn-origin", value=origin_html(Client(), first), scale=1)
    with gr.Accordion(i18n("learn_other"), open=False, elem_id="learn-other"):
        layer = gr.Dropdown(
            material.layers(),
            value=material.layers()[0],
            label=i18n("learn_layer"),
            info=i18n("learn_layer_info"),
            elem_id="learn-layer",
            filterable=True,
        )
        with gr.Row(equal_height=False):
            model = gr.Textbox(
                "bundled",
                label=i18n("learn_model"),
                info=i18n("learn_model_info"),
                elem_id="learn-model",
                scale=4,
                max_length=1000,
            )
            start = gr.Button(i18n("learn_load"), elem_id="learn-load", scale=1, min_width=120)
            back = gr.Button(i18n("learn_shipped"), elem_id="learn-back", scale=1, min_width=120)
        with gr.Row(elem_id="learn-state", equal_height=False):
            progress = html("learn-progress", scale=1)
            cancel = gr.Button(
                i18n("cancel"),
                variant="stop",
                size="sm",
                visible=False,
                elem_id="learn-cancel",
                scale=0,
                min_width=110,
            )
    timer = gr.Timer(POLL, active=False)
    watched = [progress, cancel, timer, chosen, layer]
    source = Source(chosen, origin)

    def use(now: Mapping[str, str], name: str) -> dict[str, str]:
        return {**now, "layer": name}

    source.changed.append(layer.input(use, [chosen, layer], chosen, **QUIET))
    start.click(_start, [shared.client, model], watched, **QUIET)
    # Only a tick that brings another model paints anew: of many answers a late one could be old.
    timer.tick(_look, shared.client, watched, **BUSY)
    cancel.click(_cancel, shared.client, watched, **BUSY)
    source.changed.append(back.click(_shipped, None, watched, **QUIET))
    return source


def origin_html(client: Client, chosen: Mapping[str, str]) -> str:
    """One line: which model, which linear, which part of it, and where that comes from."""
    try:
        path = Path(chosen["file"]) if chosen.get("file") else material.BUNDLED
        one = material.load(path, chosen.get("layer", ""))
        origin = material.origin(path)
    except QuantLabError as error:
        return error_message(error, client.language)
    say = client.say
    rows, columns = one.weight.shape
    text = say(
        "learn_origin",
        model=say("model_bundled") if origin.model == "bundled" else model_name(origin.model),
        layer=one.layer,
        rows=rows,
        all_rows=one.shape[0],
        first=one.first,
        last=one.first + columns - 1,
        columns=one.shape[1],
        tokens=one.inputs.shape[0],
    )
    tip = say(
        "learn_origin_tip",
        machine=origin.machine,
        date=origin.date[:10],
        tokens=origin.tokens,
        text=origin.text,
    )
    return render(
        "lesson_origin.html",
        client.language,
        text=text,
        tip=tip,
        shipped=path == material.BUNDLED,
        layer=one.layer,
        model=origin.model,
    )


def _nothing(shown: str) -> list[Any]:
    return [shown, gr.Button(visible=False), gr.Timer(active=False), gr.skip(), gr.skip()]


def _start(client: Client, model: str) -> list[Any]:
    name = (model or "").strip()
    if not name:
        return _nothing(message(client.say("learn_model_empty"), client.language, "error"))
    try:
        capture = captures(MODULE).start(name)
    except QuantLabError as error:
        return _nothing(error_message(error, client.language))
    shown = progress_html(client, capture)
    return [shown, gr.Button(visible=True), gr.Timer(active=True), gr.skip(), gr.skip()]


def _look(client: Client) -> list[Any]:
    """What the capture has come to; at its end the new slices are in use."""
    capture = captures(MODULE).current
    if capture is None:
        return _nothing("")
    if capture.error:
        error = QuantLabError(capture.error, capture.hint)
        return _nothing(error_message(error, client.language))
    if capture.cancelled:
        return _nothing(message(client.say("learn_cancelled"), client.language))
    if not capture.path:
        skips = [gr.skip() for _ in range(4)]
        return [progress_html(client, capture), *skips]
    names = material.layers(Path(capture.path))
    done = message(client.say("learn_loaded", count=len(names)), client.language)
    chosen = {"file": capture.path, "layer": names[0]}
    layer = gr.Dropdown(names, value=names[0])
    return [done, gr.Button(visible=False), gr.Timer(active=False), chosen, layer]


def _cancel(client: Client) -> list[Any]:
    capture = captures(MODULE).current
    if capture is not None and not capture.over:
        capture.cancel()
    return _look(client)


def _shipped() -> list[Any]:
    names = material.layers()
    chosen = {"file": "", "layer": names[0]}
    layer = gr.Dropdown(names, value=names[0])
    return ["", gr.Button(visible=False), gr.Timer(active=False), chosen, layer]
