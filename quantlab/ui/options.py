"""Each variant's options, as an accordion generated from its method's Config.

They are the page's own HTML rather than Gradio components, because variants come and go: Gradio
lays out the components of a `gr.render` anew by their position, and mixes up their values.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import gradio as gr

from quantlab.plots.templates import render
from quantlab.plots.words import FOLDER
from quantlab.ui import variants
from quantlab.ui.client import Client
from quantlab.ui.shared import BUSY, Shared, html, i18n


def build(data: gr.State, shared: Shared) -> Any:
    """The accordion of all options; returns the HTML inside, which `options_html` fills."""
    with gr.Accordion(i18n("options"), open=False, elem_id="options"):
        panel = html(
            "options-panel",
            "quantlab.options(element, trigger, watch)",
            events=("option", "reset"),
        )
    panel.option(_changed, data, data, **BUSY)
    panel.reset(_reset, [shared.client, data], [data, panel], **BUSY)
    return panel


def _changed(data: list[dict[str, Any]], event: gr.EventData) -> list[Any]:
    told = event._data
    return variants.set_option(data, str(told["uid"]), str(told["name"]), told["value"])


def _reset(
    client: Client, data: list[dict[str, Any]], event: gr.EventData
) -> tuple[list[Any], str]:
    changed = variants.reset_options(data, str(event._data["value"]))
    return changed, options_html(changed, client)


def options_html(data: list[dict[str, Any]], client: Client) -> str:
    """One accordion for each variant that has options."""
    shown = [
        {
            "uid": one.uid,
            "method": one.spec.method,
            "label": one.label,
            "options": [_option(one, field, client) for field in fields],
        }
        for one in variants.read(data)
        if (fields := variants.option_fields(one.spec.method))
    ]
    return render("options.html", client.language, variants=shown)


def _option(one: variants.Chip, field: dataclasses.Field[Any], client: Client) -> dict[str, object]:
    """A checkbox, drop-down or text field, as the option's metadata asks for."""
    label, help_text = _texts(one.spec.method, field, client)
    value = dict(one.spec.options).get(field.name, variants.default_of(field))
    kind = "number" if isinstance(field.default, (int, float)) else "text"
    if field.metadata.get("choices") is not None:
        kind = "choice"
    if isinstance(field.default, bool):
        kind = "bool"
    return {
        "name": field.name,
        "kind": kind,
        "label": label,
        "help": help_text,
        "value": "" if value is None else value,
        "choices": field.metadata.get("choices") or (),
        "placeholder": field.default,
    }


def _texts(method: str, field: dataclasses.Field[Any], client: Client) -> tuple[str, str]:
    """Label and help: the method's own words, or their translation where there is one."""
    known = translated(client.language)
    own = known.get(f"{method}.{field.name}") or known.get(field.name)
    label = own["label"] if own else str(field.metadata["label"])
    info = own["help"] if own else str(field.metadata["help"])
    if field.name == "group_size":
        info = f"{info} {client.say('option_group_size')}"
    return label, f"{info} {variants.limits(field)}".strip()


@cache
def translated(language: str) -> dict[str, dict[str, str]]:
    """Option (or method.option) -> label and help; English needs none, it is in the methods."""
    path = FOLDER / "options" / f"{language}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
