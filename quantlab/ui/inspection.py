"""The Inspect tab: where activations stand out, and what rounding costs every linear.

Nothing here takes long: views are drawn when the tab is opened and when something is moved. Reading
another model and measuring KL divergences are processes of their own (`inspection_source`,
`inspection_causal`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gradio as gr
from gradio.events import api as offer

from quantlab.errors import QuantLabError
from quantlab.inspection.detail import GRANULARITIES
from quantlab.inspection.survey import WIDTHS
from quantlab.plots import palette
from quantlab.ui import calibration_lab, inspection_api, options
from quantlab.ui import inspection_views as views
from quantlab.ui.asking import ask
from quantlab.ui.client import Client
from quantlab.ui.inspection_causal import RAISED, build_measuring, raised
from quantlab.ui.inspection_painting import layers, moved, origin, outliers
from quantlab.ui.inspection_source import (
    Chosen,
    Source,
    build_source,
    linear_of,
    picked,
    started,
    survey_of,
)
from quantlab.ui.messages import error_message, message
from quantlab.ui.shared import BUSY, QUIET, Shared, html, i18n

MOVING: dict[str, Any] = {**QUIET, "trigger_mode": "always_last"}
"""Events of what moves: while one answer is on its way, only the latest wish is remembered."""
MAP = "quantlab.cells(element, trigger, watch)"


@dataclass
class Inspect:
    """`controls` and `outputs` of each view by name; the painter fills `pieces`, the calibration
    lab's."""

    shared: Shared
    source: Source
    pieces: dict[str, Any] = field(default_factory=dict)
    controls: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)

    def redraw(self, event: Any) -> None:
        """After `event` (the tab was opened, another linear chosen) paint everything."""
        for name, draw in DRAWN:
            self.paint(name, event.then, draw, **QUIET)

    def paint(
        self,
        view: str,
        listen: Callable[..., Any],
        draw: Callable[..., list[Any]],
        *,
        every: bool = True,
        **settings: Any,
    ) -> None:
        """Paint a view by `draw` when what `listen` connects happens; without `every` not what
        only another linear changes."""
        still = () if every else VIEWS[view].still
        outputs = [self.outputs[one] for one in VIEWS[view].outputs if one not in still]
        ask(f"inspect-{view}", listen, draw, self.inputs(view), outputs, **settings)

    def inputs(self, view: str) -> list[Any]:
        controls = VIEWS[view].controls
        return [self.shared.client, self.source.chosen, *(self.controls[one] for one in controls)]


@dataclass(frozen=True)
class View:
    """A view's controls, its outputs, and those of them that its controls do not change."""

    controls: tuple[str, ...]
    outputs: tuple[str, ...]
    still: tuple[str, ...] = ()


VIEWS = {
    "origin": View((), ("origin", "outliers_text", "layers_text")),
    "outliers": View(
        ("alpha", "grid_bits", "symmetric", "granularity"),
        ("peaks", "note", "outlier_facts", "maxima", "inputs", "weights"),
        still=("peaks", "note"),
    ),
    "layers": View(("measure", "bits"), ("map", "layer_facts", "weight", "worst")),
}


DRAWN: tuple[tuple[str, Callable[..., list[Any]]], ...] = (
    ("origin", origin),
    ("outliers", outliers),
    ("layers", layers),
)
"""What paints each view whole."""


def build(shared: Shared) -> Inspect:
    """Lay the tab out and connect what happens within it."""
    with gr.Column(elem_id="inspect"):
        source = build_source(shared)
        tab = Inspect(shared, source)
        tab.outputs["origin"] = source.origin
        with gr.Tabs(elem_id="inspect-views"):
            with gr.Tab(i18n("inspect_outliers"), id="outliers", elem_id="inspect-tab-outliers"):
                _outliers(tab)
            with gr.Tab(i18n("inspect_layers"), id="layers", elem_id="inspect-tab-layers"):
                _layers(tab)
                seen = build_measuring(shared, source.chosen, tab.controls["bits"])
            with gr.Tab(i18n("lab"), id="lab", elem_id="inspect-tab-lab") as lab:
                tab.pieces = calibration_lab.build(shared, lab)
    tab.paint("layers", seen.change, layers, **MOVING)
    _connect(tab)
    for function in inspection_api.FUNCTIONS:
        offer(function, api_name=function.__name__, queue=False)
    return tab


def _outliers(tab: Inspect) -> None:
    tab.outputs["outliers_text"] = html("inspect-outliers-text")
    tab.outputs["peaks"] = html("inspect-peaks", MAP, events=("act",))
    tab.outputs["outlier_facts"] = html("inspect-outlier-facts")
    with gr.Row(elem_classes="ql-inspect-controls", equal_height=False):
        tab.controls["alpha"] = gr.Slider(
            0,
            1,
            0.5,
            step=0.05,
            label=i18n("inspect_alpha"),
            info=i18n("inspect_alpha_info"),
            elem_id="inspect-alpha",
            min_width=220,
        )
        tab.controls["grid_bits"] = gr.Slider(
            2, 8, 4, step=1, label=i18n("inspect_bits"), elem_id="inspect-grid-bits", min_width=180
        )
        tab.controls["granularity"] = gr.Radio(
            [(i18n(f"inspect_{one}"), one) for one in GRANULARITIES],
            value="tensor",
            label=i18n("inspect_granularity"),
            elem_id="inspect-granularity",
            min_width=220,
        )
        tab.controls["symmetric"] = gr.Radio(
            [(i18n("inspect_symmetric"), True), (i18n("inspect_asymmetric"), False)],
            value=False,
            label=i18n("inspect_grid"),
            elem_id="inspect-symmetric",
            min_width=200,
        )
    _figure(tab, "maxima")
    tab.outputs["note"] = html("inspect-note", "quantlab.lesson(element, trigger, watch)", ("act",))
    with gr.Row(equal_height=False, elem_classes="ql-inspect-pair"):
        _figure(tab, "inputs")
        _figure(tab, "weights")


def _layers(tab: Inspect) -> None:
    tab.outputs["layers_text"] = html("inspect-layers-text")
    with gr.Row(elem_classes="ql-inspect-controls", equal_height=False):
        tab.controls["measure"] = gr.Radio(
            [(i18n(f"inspect_of_{one}"), one) for one in views.MEASURES],
            value="kl",
            label=i18n("inspect_colour"),
            elem_id="inspect-colour",
            min_width=300,
        )
        tab.controls["bits"] = gr.Radio(
            list(WIDTHS), value=4, label=i18n("inspect_bits"), elem_id="inspect-bits", min_width=260
        )
    tab.outputs["map"] = html("inspect-map", MAP, events=("act",))
    tab.outputs["layer_facts"] = html("inspect-layer-facts")
    with gr.Row(equal_height=False, elem_classes="ql-inspect-pair"):
        _figure(tab, "weight")
        _figure(tab, "worst")
    with gr.Row(equal_height=False, elem_id="inspect-raise-row"):
        tab.controls["to"] = gr.Dropdown(
            [(f"{one}-bit", one) for one in RAISED],
            value=8,
            label=i18n("inspect_to"),
            elem_id="inspect-to",
            min_width=120,
            scale=0,
        )
        tab.controls["raise"] = gr.Button(
            i18n("inspect_raise"),
            elem_id="inspect-raise",
            variant="primary",
            min_width=280,
            scale=0,
        )
        tab.controls["compare"] = gr.Button(
            i18n("inspect_compare"), elem_id="inspect-compare", min_width=160, scale=0
        )
    tab.outputs["raised"] = html("inspect-raised", "quantlab.message(element, watch)")


def _figure(tab: Inspect, name: str) -> None:
    tab.outputs[name] = gr.Plot(
        show_label=False,
        container=False,
        min_width=320,
        elem_id=f"inspect-figure-{name}",
        elem_classes="ql-figure",
    )


def _connect(tab: Inspect) -> None:
    source = tab.source
    for name, draw in (("outliers", moved), ("layers", layers)):
        controls = [tab.controls[one] for one in VIEWS[name].controls]
        listen = partial(gr.on, [control.input for control in controls])
        tab.paint(name, listen, draw, every=False, **MOVING)
    choice = [source.chosen, source.block, source.linear]
    for name in ("peaks", "map"):
        tab.redraw(tab.outputs[name].act(_pick, source.chosen, choice, **QUIET))
    for event in source.changed:
        tab.redraw(event)
    for name, draw in DRAWN:
        tab.paint(name, source.chosen.change, draw, **MOVING)
        tab.paint(name, source.origin.again, draw, **QUIET)
    tab.outputs["note"].act(_read, [tab.shared.client, source.chosen], source.watched, **QUIET)


def _pick(chosen: Chosen, event: gr.EventData) -> list[Any]:
    return picked(chosen, str(event._data["value"]))


def _read(client: Client, chosen: Chosen) -> list[Any]:
    """The values of the model in view are asked for."""
    try:
        name = survey_of(chosen).origin.model
    except QuantLabError:
        name = "bundled"
    return started(client, name)


def connect_compare(tab: Inspect, tabs: Any, inputs: dict[str, Any], panel: Any) -> None:
    """Let the button write to the Compare form: its variants, its model, and their options."""
    tab.controls["raise"].click(
        _raise,
        [
            tab.shared.client,
            tab.source.chosen,
            inputs["variants"],
            inputs["model"],
            tab.controls["bits"],
            tab.controls["to"],
        ],
        [inputs["variants"], inputs["model"], panel, tab.outputs["raised"]],
        **BUSY,
    )
    tab.controls["compare"].click(lambda: gr.Tabs(selected="compare"), None, tabs, **QUIET)


def _raise(
    client: Client, chosen: Chosen, data: list[dict[str, Any]], model: str, bits: int, to: int
) -> list[Any]:
    say = client.say
    try:
        found = survey_of(chosen)
    except QuantLabError as error:
        return [*(gr.skip() for _ in range(3)), error_message(error, client.language)]
    name, own = linear_of(found, chosen).name, found.origin.model
    changed, spec = raised(data, name, int(bits), int(to))
    note = say("inspect_raised", name=name, bits=to, variant=palette.variant_label(spec.label))
    if model != own:
        note += " " + say("inspect_raised_model", model=own)
    shown = options.options_html(changed, client)
    return [changed, own if model != own else gr.skip(), shown, message(note, client.language)]
