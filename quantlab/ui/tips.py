"""Explanations of what Gradio and Plotly draw: labels of controls, titles of axes, legends.

The page's own markup carries its explanations (`data-tip`). For the rest the page's script finds
them here, by the control's id or by the text that is drawn, and shows them in the same way.
"""

from __future__ import annotations

import json
from typing import Any

import gradio as gr
from gradio.components.base import FormComponent
from gradio.i18n import I18nData

from quantlab.plots.templates import render
from quantlab.plots.words import DEFAULT, translations
from quantlab.ui.shared import html

INSPECT_LEGENDS = (
    "activations",
    "smooth_activations",
    "weights",
    "smooth_weights",
    "all",
    "inside",
    "levels",
    "usual",
    "widest",
)


def key_of(label: str) -> str | None:
    """The key of the text that explains the text `label`; None where there is none."""
    wishes = (f"tip_{label}", f"{label}_info", f"term_{label.replace('axis_', '')}")
    return next((key for key in wishes if key in translations()[DEFAULT]), None)


def controls(page: gr.Blocks) -> dict[str, str | None]:
    """What explains each control that does not say it itself, by its id."""
    return {
        str(one.elem_id): key_of(one.label.key)
        for one in page.blocks.values()
        if isinstance(one, FormComponent) and isinstance(one.label, I18nData) and not one.info
    }


def axes() -> dict[str, str | None]:
    """What explains each title of an axis, by the title's key."""
    keys = [key for key in translations()[DEFAULT] if key.startswith(("axis_", "learn_axis_"))]
    keys += [key for key in translations()[DEFAULT] if key.startswith("inspect_axis_")]
    keys += ["learn_legend_activations", "learn_legend_weights", "lab_evaluated"]
    return {key: key_of(key) for key in keys}


def legends() -> dict[str, str | None]:
    """What explains each entry of a legend, by the key of its text or of what follows a name and
    a comma in it."""
    keys = ["figure_training_first", "figure_training_last"]
    keys += [key for key in translations()[DEFAULT] if key.startswith("learn_legend_")]
    return {key: key_of(key) for key in [*keys, *(f"inspect_{one}" for one in INSPECT_LEGENDS)]}


def build(page: gr.Blocks) -> Any:
    """A hidden piece of the page that holds them, once everything else is laid out."""
    found = controls(page)
    data = {"controls": found, "axes": axes(), "legends": legends()}
    return html("tips", value=render("tips.html", data=json.dumps(data), controls=list(found)))
