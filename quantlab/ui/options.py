"""Each variant's options, as an accordion generated from its method's Config."""

from __future__ import annotations

import dataclasses
from typing import Any

import gradio as gr

from quantlab.plots.words import DEFAULT, words
from quantlab.ui import variants
from quantlab.ui.shared import QUIET, Shared, i18n

SLIDER_STEPS = 250
"""A bounded number with more steps than this is typed instead of slid."""


def build(data: gr.State, shared: Shared) -> None:
    """One accordion a variant that has options; laid out anew only when a variant comes or goes."""
    names = gr.State([])
    data.change(_identities, data, names, **QUIET)
    shared.client.change(_identities, data, names, **QUIET)
    with gr.Accordion(i18n("options"), open=False, elem_id="options"):

        @gr.render(inputs=[data], triggers=[names.change], show_progress="hidden")
        def accordions(chips: list[dict[str, Any]]) -> None:
            for one in variants.read(chips):
                if variants.option_fields(one.spec.method):
                    _accordion(one, data)


def _identities(data: list[dict[str, Any]]) -> list[str]:
    return [item["uid"] for item in data]


def _accordion(one: variants.Chip, data: gr.State) -> None:
    given = dict(one.spec.options)
    with gr.Accordion(
        one.label,
        open=False,
        elem_id=f"options-{one.uid}",
        elem_classes="ql-options",
        key=f"options-{one.uid}",
    ):
        for field in variants.option_fields(one.spec.method):
            value = given.get(field.name, variants.default_of(field))
            control = _control(one, field, value)

            def changed(
                chips: list[dict[str, Any]],
                value: Any,
                uid: str = one.uid,
                field: dataclasses.Field[Any] = field,
            ) -> list[Any]:
                return variants.set_option(chips, uid, field, value)

            event = control.release if isinstance(control, gr.Slider) else control.input
            event(changed, [data, control], data, **QUIET)


def _control(one: variants.Chip, field: dataclasses.Field[Any], value: Any) -> Any:
    """A checkbox, drop-down, slider or number, as the option's metadata asks for."""
    meta = field.metadata
    shared: dict[str, Any] = {
        "label": _text(f"option_{field.name}", meta["label"]),
        "info": _info(field),
        "elem_id": f"option-{one.uid}-{field.name.replace('_', '-')}",
        "key": f"option-{one.uid}-{field.name}",
    }
    if isinstance(field.default, bool):
        return gr.Checkbox(bool(value), **shared)
    if meta.get("choices") is not None:
        return gr.Dropdown(list(meta["choices"]), value=value, **shared)
    low, high, step = (meta.get(name) for name in ("minimum", "maximum", "step"))
    if None not in (low, high, step) and (high - low) / step <= SLIDER_STEPS:
        return gr.Slider(low, high, value=value, step=step, **shared)
    if isinstance(field.default, (int, float)):
        return gr.Number(value, placeholder=str(field.default), **shared)
    return gr.Textbox(str(value), **shared)


def _info(field: dataclasses.Field[Any]) -> Any:
    if field.name == "group_size":
        return i18n("option_group_size_help")
    return _text(f"option_{field.name}_help", variants.help_text(field))


def _text(key: str, fallback: str) -> Any:
    """The translation of an option's text where there is one, else the method's own words."""
    return i18n(key) if words(DEFAULT).has(key) else fallback
