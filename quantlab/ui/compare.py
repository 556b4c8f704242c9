"""The Compare tab: choose, run, watch, read. The form is on the left, results on the right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from quantlab.methods import METHODS
from quantlab.models import CATALOGUE
from quantlab.plots import FIGURES
from quantlab.ui import actions, form, options, variants
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
    pressed: Any = None


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
                # Gradio itself would refuse, in a toast, what the method before this one had and
                # the browser still shows; `variants.add` knows what to do with it.
                allow_custom_value=True,
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
        _lines(tab, start, "prompts", 3)
        _number(tab, start, "max_new_tokens")
        _lines(tab, start, "stop_strings", 1)
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
            upload.upload(actions.uploaded, upload, tab.inputs[name], **BUSY)
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


def _lines(tab: Compare, start: dict[str, Any], name: str, lines: int) -> None:
    tab.inputs[name] = gr.Textbox(
        start[name],
        label=i18n(name),
        info=i18n(f"{name}_info"),
        lines=lines,
        max_lines=8,
        elem_id=_id(name),
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
    with gr.Accordion(i18n("pairs"), open=False, visible=False, elem_id="pairs-section") as section:
        tab.pieces["pairs_section"] = section
        tab.pieces["pairs"] = html("pairs")
    tab.pieces["table"] = html("results-table", "quantlab.table(element, watch)")
    tab.pieces["autopsy"] = html("autopsy")
    with gr.Column(visible=False, elem_id="figures") as figures:
        tab.pieces["figures"] = figures
        names = list(FIGURES)
        for pair in (names[:2], names[2:4], names[4:]):
            trained = pair == ["training"]  # Only there where something was trained.
            with gr.Row(elem_classes="ql-figure-row", visible=not trained) as row:
                if trained:
                    tab.pieces["training"] = row
                for name in pair:
                    tab.figures[name] = gr.Plot(
                        show_label=False,
                        container=False,
                        min_width=320,
                        elem_id=f"figure-{_id(name)}",
                        elem_classes="ql-figure",
                    )


# What happens


def _connect(tab: Compare, shared: Shared) -> None:
    inputs = [tab.inputs[name] for name in form.FIELDS]
    places = [tab.messages[place] for place in form.PLACES]
    accordions = [tab.accordions[name] for name in ("texts", "prompts", "advanced")]
    tab.pressed = gr.State(actions.Pressed())
    looking = (
        actions.look,
        [shared.client, tab.pressed, *inputs],
        [tab.estimate, tab.saved, *places, *accordions],
    )
    gr.on(
        [component.input for name, component in tab.inputs.items() if name != "variants"]
        + [tab.inputs[name].change for name in ("variants", "calibration", "text")],
        *looking,
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
        actions.start,
        [shared.client, shared.run_id, tab.pressed, *inputs],
        [shared.run_id, *places, *accordions],
        **BUSY,
    )
    started.then(None, None, None, js="() => window.quantlab.reveal('results')")
    # A look that was answered before Run can arrive after it, and would take its refusal away.
    started.then(*looking, **BUSY)
    queue = tab.pieces["queue"]
    shared.repaint += [
        started,
        tab.pieces["cancel"].click(actions.cancel, shared.run_id, None, **QUIET),
        queue.show(actions.show, None, shared.run_id, **QUIET),
        queue.cancel(actions.cancel_other, None, None, **QUIET),
    ]


def _connect_adding(tab: Compare, shared: Shared, method: Any, kind: Any, add: Any) -> None:
    def kinds(chosen: str) -> Any:
        choices = variants.kind_choices(chosen)
        return gr.Dropdown(
            choices=choices, value=variants.default_kind(chosen), interactive=bool(choices)
        )

    method.input(kinds, method, kind, **QUIET)
    add.click(
        actions.added,
        [shared.client, tab.inputs["variants"], method, kind],
        [tab.inputs["variants"], tab.options, tab.messages["variants"]],
        **BUSY,
    )
    tab.chips.remove(
        actions.removed,
        [shared.client, tab.inputs["variants"]],
        [tab.inputs["variants"], tab.options],
        **BUSY,
    )
