"""Which model the Inspect tab shows: the survey that ships, or that of another model, which a
process of its own makes (`quantlab.inspection.capture`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from quantlab.errors import QuantLabError
from quantlab.inspection import survey
from quantlab.inspection.survey import Linear, Survey
from quantlab.learn import capture as learn
from quantlab.learn import material
from quantlab.learn.material import Slice
from quantlab.plots.templates import render
from quantlab.ui.captures import POLL, captures, progress_html
from quantlab.ui.client import Client
from quantlab.ui.messages import error_message, message
from quantlab.ui.shared import BUSY, QUIET, Shared, html, i18n
from quantlab.ui.views import model_name

MODULE = "quantlab.inspection.capture"
FIRST = "11.mlp.down_proj"
"""The linear of the bundled model whose input holds a massive activation."""

Chosen = Mapping[str, str]
"""{"file": the survey's path, '' for what ships, "name": the linear's}"""


def survey_of(chosen: Chosen) -> Survey:
    """Raises: ModelError."""
    return survey.load(Path(chosen["file"]) if chosen.get("file") else survey.BUNDLED)


def linear_of(found: Survey, chosen: Chosen) -> Linear:
    """The chosen linear, or the first where there is none of that name."""
    return found.linears.get(chosen.get("name", "")) or next(iter(found.linears.values()))


def slice_of(found: Survey, one: Linear) -> Slice | None:
    """Real values of a linear: of the model's own slices where they were captured, else of those
    that ship; None where there are none. Raises: ModelError."""
    model = found.origin.fingerprint
    for path in (learn.file_of(model), material.BUNDLED):
        of_model = path.is_file() and material.origin(path).fingerprint == model
        if of_model and one.name in material.layers(path):
            return material.load(path, one.name)
    return None


def title_of(found: Survey, client: Client) -> str:
    """The model's name for people."""
    name = found.origin.model
    return client.say("model_bundled") if name == "bundled" else model_name(name)


@dataclass
class Source:
    """`chosen` is a `Chosen`; `changed` are events after which it is another one, beside its own
    change when a model was read."""

    chosen: Any
    origin: Any
    block: Any
    linear: Any
    read: Any
    watched: list[Any] = field(default_factory=list)
    changed: list[Any] = field(default_factory=list)


def build_source(shared: Shared) -> Source:
    """The line that says what is shown, the choice of another model, and of a linear."""
    found = survey.load()
    chosen = gr.State({"file": "", "name": FIRST})
    places = [f"inspect-{view}" for view in ("origin", "outliers", "layers")]
    origin = html("inspect-origin", f"quantlab.again({places}, trigger)", events=("again",))
    with (
        gr.Accordion(i18n("inspect_other"), open=False, elem_id="inspect-other"),
        gr.Row(equal_height=False),
    ):
        model = gr.Textbox(
            "bundled",
            label=i18n("learn_model"),
            info=i18n("learn_model_info"),
            elem_id="inspect-model",
            scale=4,
            max_length=1000,
        )
        start = gr.Button(i18n("inspect_read"), elem_id="inspect-read", scale=1, min_width=120)
        back = gr.Button(i18n("inspect_shipped"), elem_id="inspect-back", scale=1, min_width=120)
    with gr.Row(elem_id="inspect-state", elem_classes="ql-job", equal_height=False):
        progress = html("inspect-progress", "quantlab.message(element, watch)", scale=1)
        cancel = gr.Button(
            i18n("cancel"),
            variant="stop",
            size="sm",
            visible=False,
            elem_id="inspect-cancel",
            scale=0,
            min_width=110,
        )
    with gr.Row(elem_id="inspect-choice", equal_height=False):
        block = gr.Dropdown(
            block_choices(found),
            value=linear_of(found, {"name": FIRST}).block,
            label=i18n("inspect_block"),
            elem_id="inspect-block",
            min_width=120,
        )
        linear = gr.Dropdown(
            found.paths,
            value=linear_of(found, {"name": FIRST}).path,
            label=i18n("inspect_linear"),
            elem_id="inspect-linear",
            min_width=180,
        )
    timer = gr.Timer(POLL, active=False)
    watched = [progress, cancel, timer, chosen, block, linear]
    source = Source(chosen, origin, block, linear, start, watched)

    gr.on([start.click, model.submit], _start, [shared.client, model], watched, **QUIET)
    source.changed += [
        back.click(_shipped, None, watched, **QUIET),
        gr.on([block.input, linear.input], _choose, [chosen, block, linear], chosen, **QUIET),
    ]
    # Only a tick that brings another model paints anew: of many answers a late one could be old.
    timer.tick(_look, shared.client, watched, **BUSY)
    cancel.click(_cancel, shared.client, watched, **BUSY)
    return source


def block_choices(found: Survey) -> list[tuple[str, int]]:
    return [(str(block), block) for block in range(found.blocks)]


def _choose(now: Chosen, block: int, path: str) -> dict[str, str]:
    return {**now, "name": f"{block}.{path}"}


def picked(now: Chosen, name: str) -> list[Any]:
    """A cell of a heatmap was chosen: updates of the choice and both drop-downs."""
    try:
        one = linear_of(survey_of(now), {"name": name})
    except QuantLabError:
        return [gr.skip(), gr.skip(), gr.skip()]
    return [{**now, "name": one.name}, one.block, one.path]


def origin_html(client: Client, chosen: Chosen) -> str:
    """One line: which model, from how many tokens of which text, and where that comes from."""
    try:
        found = survey_of(chosen)
    except QuantLabError as error:
        return error_message(error, client.language)
    say, origin = client.say, found.origin
    return render(
        "inspect_origin.html",
        client.language,
        text=say(
            "inspect_origin",
            model=title_of(found, client),
            blocks=found.blocks,
            linears=len(found.linears),
            tokens=f"{origin.tokens:,}",
        ),
        tip=say("inspect_origin_tip", machine=origin.machine, date=origin.date[:10]),
        shipped=not chosen.get("file"),
        model=origin.model,
    )


def started(client: Client, model: str) -> list[Any]:
    """Start to read a model; updates of `Source.watched`."""
    name = (model or "").strip()
    if not name:
        return _nothing(message(client.say("learn_model_empty"), client.language, "error"))
    try:
        capture = captures(MODULE).start(name)
    except QuantLabError as error:
        return _nothing(error_message(error, client.language))
    shown = progress_html(client, capture)
    return [shown, gr.Button(visible=True), gr.Timer(active=True), *_skips()]


def _start(client: Client, model: str) -> list[Any]:
    return started(client, model)


def _skips() -> list[Any]:
    return [gr.skip() for _ in range(3)]


def _nothing(shown: str) -> list[Any]:
    return [shown, gr.Button(visible=False), gr.Timer(active=False), *_skips()]


def _look(client: Client) -> list[Any]:
    """What the process has come to; at its end the new survey is in use."""
    capture = captures(MODULE).current
    if capture is None:
        return _nothing("")
    if capture.error:
        error = QuantLabError(capture.error, capture.hint)
        return _nothing(error_message(error, client.language))
    if capture.cancelled:
        return _nothing(message(client.say("inspect_cancelled"), client.language))
    if not capture.path:
        return [progress_html(client, capture), gr.skip(), gr.skip(), *_skips()]
    try:
        return _used(client, capture.path)
    except QuantLabError as error:
        return _nothing(error_message(error, client.language))


def _used(client: Client, path: str) -> list[Any]:
    found = survey.load(Path(path))
    name = FIRST if FIRST in found.linears else most_outlying(found)
    note = client.say("inspect_done", count=len(found.linears))
    chosen = {"file": path, "name": name}
    return [
        message(note, client.language),
        gr.Button(visible=False),
        gr.Timer(active=False),
        *_choice(found, chosen),
    ]


def most_outlying(found: Survey) -> str:
    """The linear whose input has the largest value."""
    return max(found.linears.values(), key=lambda one: float(one.read.peaks.max())).name


def _choice(found: Survey, chosen: Chosen) -> list[Any]:
    one = linear_of(found, chosen)
    return [
        chosen,
        gr.Dropdown(block_choices(found), value=one.block),
        gr.Dropdown(found.paths, value=one.path),
    ]


def _cancel(client: Client) -> list[Any]:
    capture = captures(MODULE).current
    if capture is not None and not capture.over:
        capture.cancel()
    return _look(client)


def _shipped() -> list[Any]:
    chosen = {"file": "", "name": FIRST}
    found = survey.load()
    return ["", gr.Button(visible=False), gr.Timer(active=False), *_choice(found, chosen)]
