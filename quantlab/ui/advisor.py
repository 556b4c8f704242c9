"""The Advisor tab: what a model needs, where it fits, how fast it could be, and what to choose.

Everything but the bandwidth of this machine is arithmetic; that is measured when a button asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import gradio as gr
from gradio.events import api

from quantlab import advisor
from quantlab.advisor.devices import TABLE, THIS
from quantlab.errors import ConfigError, JobError, QuantLabError
from quantlab.models import CATALOGUE
from quantlab.plots.words import Words
from quantlab.runs import Run
from quantlab.ui import advisor_views
from quantlab.ui.asking import ask
from quantlab.ui.client import Client
from quantlab.ui.messages import error_message, message
from quantlab.ui.services import services
from quantlab.ui.shared import BUSY, QUIET, Shared, html, i18n

BY_COUNT, BY_SHAPE = "by-count", "by-shape"
SHAPE = {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "vocabulary": 32_000}
"""The numbers of a shape and what they start as."""
FIELDS = ("model", "parameters", *SHAPE, "context", "batch", "device", "use")


@dataclass
class Advisor:
    """`inputs` by name, the two `outputs` they fill, and the `arguments` of what fills them."""

    inputs: dict[str, Any] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    arguments: list[Any] = field(default_factory=list)

    def answer(self, listen: Callable[..., Any], settings: Mapping[str, Any] = QUIET) -> None:
        """Answer what the form asks when what `listen` connects happens."""
        ask("advisor", listen, answered, self.arguments, self.outputs, **settings)


def build(shared: Shared) -> Advisor:
    """Lay the tab out: the question on the left, the advice on the right, tables below."""
    tab = Advisor()
    bandwidth = gr.State(None)
    with gr.Row(elem_id="advisor", equal_height=False):
        with gr.Column(scale=1, min_width=320, elem_id="advisor-form"):
            _form(tab)
            measure = gr.Button(i18n("advisor_measure"), elem_id="advisor-measure", size="sm")
            notice = html("advisor-message", "quantlab.message(element, watch)")
        with gr.Column(scale=2, min_width=320, elem_id="advisor-results"):
            again = "quantlab.again(['advisor'], trigger)"
            answer = html("advisor-answer", again, events=("again",))
            beside = html("advisor-beside")
    inputs = [tab.inputs[name] for name in FIELDS]
    tab.arguments = [shared.client, shared.run_id, bandwidth, *inputs]
    tab.outputs = [answer, beside]
    tab.answer(partial(gr.on, [one.change for one in inputs]))
    tab.answer(answer.again)
    measured = measure.click(_measure, shared.client, [bandwidth, notice], **BUSY)
    tab.answer(measured.then, BUSY)
    api(advise, api_name="advise")
    return tab


def _form(tab: Advisor) -> None:
    catalogue = [(entry.title, entry.id) for entry in CATALOGUE]
    known = [(name, name) for name in advisor.WELL_KNOWN]
    own = [(i18n("advisor_by_count"), BY_COUNT), (i18n("advisor_by_shape"), BY_SHAPE)]
    tab.inputs["model"] = gr.Dropdown(
        [*catalogue, *known, *own],
        value=CATALOGUE[0].id,
        label=i18n("advisor_model"),
        info=i18n("advisor_model_info"),
        elem_id="advisor-model",
    )
    with gr.Column(visible=False, elem_id="advisor-count") as count:
        tab.inputs["parameters"] = gr.Number(
            7,
            label=i18n("advisor_parameters"),
            info=i18n("advisor_parameters_info"),
            elem_id="advisor-parameters",
        )
    with gr.Column(visible=False, elem_id="advisor-shape") as shape:
        for name, value in SHAPE.items():
            _number(tab, name, value)
    with gr.Row():
        _number(tab, "context", 4096)
        _number(tab, "batch", 1)
    titles: list[tuple[Any, str]] = [(i18n("advisor_this"), THIS)]
    titles += [
        (i18n("advisor_phone") if one.kind == "phone" else one.title, one.id)
        for one in TABLE.values()
    ]
    for name, choices in (
        ("device", titles),
        ("use", [(i18n(f"advisor_{use}"), use) for use in advisor.USES]),
    ):
        tab.inputs[name] = gr.Dropdown(
            choices,
            value=choices[0][1],
            label=i18n(f"advisor_{name}"),
            elem_id=f"advisor-{name}",
        )
    tab.inputs["model"].change(
        lambda model: (gr.Column(visible=model == BY_COUNT), gr.Column(visible=model == BY_SHAPE)),
        tab.inputs["model"],
        [count, shape],
        **QUIET,
    )


def _number(tab: Advisor, name: str, value: int) -> None:
    # No minimum here: Gradio would refuse with a toast of its own, far from the field.
    tab.inputs[name] = gr.Number(
        value,
        label=i18n(f"advisor_{name}"),
        elem_id=f"advisor-{name.replace('_', '-')}",
        min_width=120,
    )


def answered(client: Client, run_id: str, bandwidth: float | None, *values: Any) -> tuple[str, str]:
    """The advice for what the form holds, or one message, and the tables of others' figures."""
    run = _run(run_id)
    beside = advisor_views.beside(client, run)
    try:
        advice = _advice(dict(zip(FIELDS, values, strict=True)), bandwidth, client.say)
    except QuantLabError as error:
        return error_message(error, client.language), beside
    return advisor_views.answer(client, advice, run), beside


def _run(run_id: str) -> Run | None:
    try:
        return services().run(run_id)
    except JobError:
        return None  # Deleted, here or in another tab.


def _advice(form: dict[str, Any], bandwidth: float | None, say: Words) -> advisor.Advice:
    """Raises: ConfigError in the form's language for what is no number, else as `advise`."""

    def whole(name: str) -> int:
        value = form[name]
        if value is None or not math.isfinite(value) or value != int(value) or value < 1:
            raise ConfigError(say("advisor_not_whole", field=say(f"advisor_{name}")))
        return int(value)

    context, batch = whole("context"), whole("batch")
    if form["model"] == BY_COUNT:
        if form["parameters"] is None:
            raise ConfigError(say("advisor_not_number", field=say("advisor_parameters")))
        shape = advisor.guess(form["parameters"] * 1e9)
    elif form["model"] == BY_SHAPE:
        shape = advisor.of_shape(**{name: whole(name) for name in SHAPE})
    else:
        shape = _known(str(form["model"]))
    at = advisor.device(str(form["device"]), bandwidth)
    return advisor.advise(shape, context, batch, at, str(form["use"]))


def _known(model: str) -> advisor.ModelShape:
    if model not in advisor.SHAPES:
        raise ConfigError(f"model: unknown {model!r}; choose {', '.join(advisor.SHAPES)}")
    return advisor.SHAPES[model]


def _measure(client: Client) -> tuple[Any, str]:
    """This machine's bandwidth, unless a comparison is running whose figures it would spoil."""
    if services().queue.active() is not None:
        return gr.skip(), message(client.say("advisor_measure_busy"), client.language, "error")
    try:
        found = advisor.measure_bandwidth()
    except QuantLabError as error:
        return gr.skip(), error_message(error, client.language)
    note = client.say("advisor_measured", speed=f"{found / 1e9:.1f}")
    return found, message(note, client.language)


def advise(
    model: str = "bundled",
    parameters: float = 0,
    context: int = 4096,
    batch: int = 1,
    device: str = "this",
    use: Literal["research", "production", "edge", "experiment"] = "edge",
) -> dict[str, Any]:
    """Memory, speed at best and the recommended quantization of a language model on a device.

    Args:
        model: a catalogued model's id or a well-known name such as Llama-2-7B.
        parameters: number of weights, if not 0 instead of `model`; the shape is then guessed.
        context: tokens of each sequence that the KV cache holds.
        batch: sequences answered at the same time.
        device: this phone pi5 rtx3060 rtx4090 a100-40 a100-80 h100-80 macbook-16 macbook-32.
        use: what it is for; decides the precision that is recommended.

    Returns:
        `choice` (or null), and for each variant its bytes, whether it fits, and tokens/s at most.
    """
    try:
        shape = advisor.guess(parameters) if parameters else _known(model)
        found = advisor.advise(shape, context, batch, advisor.device(device), use)
    except QuantLabError as error:
        raise gr.Error(str(error), print_exception=False) from None
    return {
        "choice": found.choice.variant if found.choice else None,
        "parameters": shape.parameters,
        "guessed": shape.guessed,
        "usable_bytes": found.device.usable,
        "variants": [
            {
                "variant": row.variant,
                "bits_per_weight": row.size.bits_per_weight,
                "weight_bytes": row.memory.weights,
                "kv_cache_bytes": row.memory.kv_cache,
                "total_bytes": row.memory.total,
                "fit": row.fit,
                "tokens_per_second_at_most": row.tokens_per_second,
            }
            for row in found.rows
        ],
    }
