"""The Compare tab: choose, run, watch, read. The form is on the left, results on the right."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from quantlab import pipeline
from quantlab.errors import QuantLabError
from quantlab.methods import METHODS
from quantlab.models import CATALOGUE
from quantlab.plots import FIGURES, numbers
from quantlab.plots.templates import render
from quantlab.types import RunSpec
from quantlab.ui import form, options, variants
from quantlab.ui.client import Client
from quantlab.ui.messages import error_message, message
from quantlab.ui.services import services
from quantlab.ui.shared import BUSY, QUIET, Shared, html, i18n

TEXT_NAMES = ("project", "self", "wikitext2", "c4")


@dataclass
class Compare:
    """The components of the tab that others fill: `inputs` by field name, `pieces` by name."""

    inputs: dict[str, Any] = field(default_factory=dict)
    messages: dict[str, Any] = field(default_factory=dict)
    accordions: dict[str, Any] = field(default_factory=dict)
    pieces: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    chips: Any = None
    options: Any = None
    estimate: Any = None
    saved: Any = None
    run: Any = None


def build(shared: Shared) -> Compare:
    """Lay the tab out and connect what happens within it."""
    tab = Compare()
    tab.saved = gr.BrowserState(None, storage_key="quantlab-form", secret="quantlab")
    with gr.Row(elem_id="compare", equal_height=False):
        with gr.Column(scale=1, min_width=320, elem_id="form"):
            _form(tab, shared)
        with gr.Column(scale=2, min_width=320, elem_id="results"):
            _results(tab)
    _connect(tab, shared)
    return tab


# The form


def _form(tab: Compare, shared: Shared) -> None:
    start = form.defaults()
    tab.inputs["model"] = gr.Dropdown(
        _model_choices(),
        value=start["model"],
        label=i18n("model"),
        info=i18n("model_info"),
        allow_custom_value=True,
        filterable=True,
        elem_id="model",
    )
    _message(tab, "model")
    tab.inputs["variants"] = gr.State(start["variants"])
    with gr.Column(elem_id="variants"):
        tab.pieces["variants_title"] = html("variants-title")
        tab.chips = html(
            "chips",
            "quantlab.chips(element, trigger)",
            events=("remove",),
            value=variants.chips_html(start["variants"], "en"),
        )
        first = "gptq" if "gptq" in METHODS else next(iter(METHODS))
        with gr.Row(elem_id="add-row"):
            method = gr.Dropdown(
                variants.method_choices(),
                value=first,
                label=i18n("add_method"),
                elem_id="add-method",
                min_width=110,
                scale=3,
            )
            kind = gr.Dropdown(
                variants.kind_choices(first),
                value=variants.default_kind(first),
                label=i18n("add_bits"),
                elem_id="add-bits",
                min_width=80,
                scale=2,
            )
            add = gr.Button(i18n("add"), elem_id="add", size="sm", min_width=70, scale=1)
    _message(tab, "variants")
    tab.options = options.build(tab.inputs["variants"], shared)
    _texts(tab, start)
    with gr.Accordion(i18n("prompts"), open=False, elem_id="prompts-section") as section:
        tab.accordions["prompts"] = section
        tab.inputs["prompts"] = gr.Textbox(
            start["prompts"],
            label=i18n("prompts"),
            info=i18n("prompts_info"),
            lines=3,
            max_lines=8,
            elem_id="prompts",
        )
        _number(tab, start, "max_new_tokens")
        _message(tab, "prompts")
    _advanced(tab, start)
    tab.estimate = html("estimate")
    tab.run = gr.Button(i18n("run_comparison"), variant="primary", elem_id="run", size="lg")
    _message(tab, "run")
    _connect_adding(tab, shared, method, kind, add)


def _texts(tab: Compare, start: dict[str, Any]) -> None:
    with gr.Accordion(i18n("texts"), open=False, elem_id="texts-section") as section:
        tab.accordions["texts"] = section
        for name, label, info in (
            ("calibration", "calibration", "calibration_info"),
            ("text", "evaluation", "evaluation_info"),
        ):
            names = [one for one in TEXT_NAMES if name == "calibration" or one != "self"]
            tab.inputs[name] = gr.Dropdown(
                [(i18n(f"text_{one}"), one) for one in names],
                value=start[name],
                label=i18n(label),
                info=i18n(info),
                allow_custom_value=True,
                elem_id=label,
            )
            upload = gr.UploadButton(
                i18n("upload"),
                file_types=["text", ".txt", ".md"],
                size="sm",
                elem_id=f"upload-{label}",
            )
            upload.upload(_uploaded, upload, tab.inputs[name], **BUSY)
        with gr.Row():
            _number(tab, start, "calibration_tokens")
            _number(tab, start, "eval_tokens")
        with gr.Row():
            _number(tab, start, "calibration_length", "calibration_length_info")
            _number(tab, start, "window", "window_info")
        _message(tab, "texts")


def _advanced(tab: Compare, start: dict[str, Any]) -> None:
    with gr.Accordion(i18n("advanced"), open=False, elem_id="advanced-section") as section:
        tab.accordions["advanced"] = section
        with gr.Row():
            _number(tab, start, "group_size", "group_size_info")
            _number(tab, start, "seed", "seed_info")
        with gr.Row():
            _number(tab, start, "threads", "threads_info")
            tab.inputs["device"] = gr.Dropdown(
                ["auto", "cpu", "cuda"],
                value=start["device"],
                label=i18n("device"),
                info=i18n("device_info"),
                elem_id="device",
                min_width=120,
            )
        for name in ("allow_pickle", "trust_remote_code"):
            tab.inputs[name] = gr.Checkbox(
                start[name], label=i18n(name), info=i18n(f"{name}_info"), elem_id=_id(name)
            )
        _message(tab, "advanced")


def _model_choices() -> list[tuple[Any, str]]:
    return [
        (i18n("model_bundled") if entry.id == "bundled" else entry.id, entry.id)
        for entry in CATALOGUE
    ]


def _number(tab: Compare, start: dict[str, Any], name: str, info: str | None = None) -> None:
    # No minimum here: Gradio would refuse with a toast of its own, far from the field.
    tab.inputs[name] = gr.Number(
        start[name],
        label=i18n(name),
        info=i18n(info) if info else None,
        precision=None,
        elem_id=_id(name),
        min_width=120,
    )


def _message(tab: Compare, place: str) -> None:
    tab.messages[place] = html(f"message-{place}", "quantlab.message(element, watch)")


def _id(name: str) -> str:
    return name.replace("_", "-")


# The results


def _results(tab: Compare) -> None:
    with gr.Row(elem_id="progress-row", equal_height=False):
        tab.pieces["progress"] = html("progress", scale=1)
        tab.pieces["cancel"] = gr.Button(
            i18n("cancel"),
            variant="stop",
            elem_id="cancel",
            visible=False,
            size="sm",
            scale=0,
            min_width=110,
        )
    tab.pieces["queue"] = html(
        "queue", "quantlab.forward(element, trigger, ['show', 'cancel'])", events=("show", "cancel")
    )
    tab.pieces["verdict"] = html("verdict")
    tab.pieces["table"] = html("results-table", "quantlab.table(element, watch)")
    with gr.Column(visible=False, elem_id="figures") as figures:
        tab.pieces["figures"] = figures
        names = list(FIGURES)
        for pair in (names[:2], names[2:]):
            with gr.Row(elem_classes="ql-figure-row"):
                for name in pair:
                    tab.figures[name] = gr.Plot(
                        show_label=False,
                        container=False,
                        min_width=320,
                        elem_id=f"figure-{_id(name)}",
                        elem_classes="ql-figure",
                    )
    tab.pieces["empty"] = html("empty")


# What happens


def _connect(tab: Compare, shared: Shared) -> None:
    inputs = [tab.inputs[name] for name in form.FIELDS]
    places = [tab.messages[place] for place in form.PLACES]
    accordions = [tab.accordions[name] for name in ("texts", "prompts", "advanced")]

    gr.on(
        [component.input for name, component in tab.inputs.items() if name != "variants"]
        + [tab.inputs[name].change for name in ("variants", "calibration", "text")],
        _look,
        [shared.client, *inputs],
        [tab.estimate, tab.saved, *places, *accordions],
        trigger_mode="always_last",
        **BUSY,
    )
    tab.inputs["variants"].change(
        lambda client, data: variants.chips_html(data, client.language),
        [shared.client, tab.inputs["variants"]],
        tab.chips,
        **QUIET,
    )
    started = tab.run.click(
        _run,
        [shared.client, shared.run_id, *inputs],
        [shared.run_id, *places, *accordions],
        **BUSY,
    )
    shared.repaint.append(started)
    shared.repaint.append(tab.pieces["cancel"].click(_cancel, [shared.run_id], None, **QUIET))
    shared.repaint.append(tab.pieces["queue"].show(_show, None, shared.run_id, **QUIET))
    shared.repaint.append(tab.pieces["queue"].cancel(_cancel_other, None, None, **QUIET))


def _connect_adding(tab: Compare, shared: Shared, method: Any, kind: Any, add: Any) -> None:
    def kinds(chosen: str) -> Any:
        choices = variants.kind_choices(chosen)
        return gr.Dropdown(
            choices=choices, value=variants.default_kind(chosen), interactive=bool(choices)
        )

    method.input(kinds, method, kind, **QUIET)
    add.click(
        _added,
        [shared.client, tab.inputs["variants"], method, kind],
        [tab.inputs["variants"], tab.options, tab.messages["variants"]],
        **BUSY,
    )
    tab.chips.remove(
        _removed,
        [shared.client, tab.inputs["variants"]],
        [tab.inputs["variants"], tab.options],
        **BUSY,
    )


def _added(
    client: Client, data: list[dict[str, Any]], method: str, kind: str | None
) -> tuple[Any, Any, str]:
    try:
        more = variants.add(data, method, kind, client.say)
    except QuantLabError as error:
        return gr.skip(), gr.skip(), error_message(error, client.language)
    return more, options.options_html(more, client), ""


def _removed(
    client: Client, data: list[dict[str, Any]], event: gr.EventData
) -> tuple[list[Any], str]:
    fewer = variants.remove(data, str(event._data["value"]))
    return fewer, options.options_html(fewer, client)


def _uploaded(path: str) -> str:
    """Keep an uploaded text where it outlives the browser's temporary files; returns its path."""
    source = Path(path)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    folder = services().store.root / "texts" / digest
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    shutil.copyfile(source, target)
    return str(target)


def placed(error: QuantLabError | None, client: Client, note: str = "") -> list[Any]:
    """The messages of all places and the accordions: one error where it belongs, else the note."""
    where = form.place_of(error) if error else "run"
    shown: list[Any] = [""] * len(form.PLACES)
    if error is not None:
        shown[form.PLACES.index(where)] = error_message(error, client.language)
    elif note:
        shown[form.PLACES.index("run")] = message(note, client.language)
    opened = [
        gr.Accordion(open=True) if error is not None and name == where else gr.skip()
        for name in ("texts", "prompts", "advanced")
    ]
    return [*shown, *opened]


def estimate_html(client: Client, spec: RunSpec) -> str:
    """Time and memory of a run; where they cannot be known yet, the pipeline's note says why."""
    cost = pipeline.estimate(spec)
    return render(
        "estimate.html",
        client.language,
        time=numbers.clock(cost.seconds) if cost.seconds else None,
        memory=numbers.gigabytes(cost.peak_bytes) if cost.peak_bytes else None,
        note=cost.note,
    )


def no_estimate(client: Client) -> str:
    return render("estimate_none.html", client.language)


def _look(client: Client, *values: Any) -> list[Any]:
    """The form has changed: estimate it again, keep it in the browser, show what is wrong."""
    data = dict(zip(form.FIELDS, values, strict=True))
    problem = None
    try:
        spec = form.spec_of(data, client.say)
        shown = estimate_html(client, spec)
    except QuantLabError as error:
        shown, problem = no_estimate(client), error
    messages = placed(problem, client)
    at_run = form.PLACES.index("run")
    if not messages[at_run]:  # What the Run button said last stays until it is pressed again.
        messages[at_run] = gr.skip()
    return [shown, data, *messages]


def _run(client: Client, run_id: str, *values: Any) -> list[Any]:
    """Queue the comparison of the form; an error stays beside the control it is about."""
    say = client.say
    try:
        spec = form.spec_of(dict(zip(form.FIELDS, values, strict=True)), say)
        pipeline.validate(spec)
        queue = services().queue
        before = {queue.active(), *queue.waiting()} - {None}
        new = queue.submit(spec)
        view = queue.view(new)
    except QuantLabError as error:
        return [gr.skip(), *placed(error, client)]
    if new in before:
        return [new, *placed(None, client, say("run_same", status=say(f"status_{view.status}")))]
    if before:
        # Whoever watches the running one goes on watching it; the queue shows the new one.
        shown = gr.skip() if run_id in before else new
        note = say("run_queued", position=max(view.position, 1))
        return [shown, *placed(None, client, note)]
    return [new, *placed(None, client, say("run_started"))]


def _cancel(run_id: str) -> None:
    """Cancel the run in view, and with it the answers that are being generated for it."""
    queue = services().queue
    active = queue.active()
    if active and services().comparison_of(active) == run_id:
        queue.cancel(active)
    queue.cancel(run_id)


def _cancel_other(event: gr.EventData) -> None:
    services().queue.cancel(str(event._data["value"]))


def _show(event: gr.EventData) -> str:
    return services().comparison_of(str(event._data["value"]))
