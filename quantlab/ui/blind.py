"""The blind test in the Outputs tab: two answers without names, a vote, the names, the tally."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from quantlab.errors import QuantLabError
from quantlab.plots import palette
from quantlab.plots.templates import render
from quantlab.ui.client import Client
from quantlab.ui.messages import error_message, message
from quantlab.ui.services import services
from quantlab.ui.shared import BUSY, Shared, html, i18n
from quantlab.votes import Tally, Trial, Vote, draw, tally, trials

CHANCE = random.SystemRandom()
VOTES = ("left", "tie", "right")


@dataclass(frozen=True)
class Asked:
    """The trial before the person's eyes, and the comparison it belongs to. It stays on the server:
    the page does not know the names until it is told."""

    run_id: str
    trial: Trial


def build(shared: Shared) -> dict[str, Any]:
    """Lay the section out and connect it; the piece that the painter fills."""
    asked = gr.State(None)
    with gr.Accordion(i18n("blind"), open=False, elem_id="blind-section"):
        box = html(
            "blind", "quantlab.forward(element, trigger, ['next', 'vote'])", events=("next", "vote")
        )
        notice = html("blind-message", "quantlab.message(element, watch)")
    box.next(_next, [shared.client, shared.run_id], [box, asked, notice], **BUSY)
    box.vote(_vote, [shared.client, asked], [box, asked, notice], **BUSY)
    return {"blind": box}


def _next(client: Client, run_id: str) -> tuple[Any, Asked | None, str]:
    """Draw a pair of answers; a note where there is none."""
    if not run_id:
        return gr.skip(), None, message(client.say("blind_shipped"), client.language)
    try:
        trial = draw(_candidates(run_id), services().store.votes(run_id), CHANCE)
    except QuantLabError as error:
        return gr.skip(), None, error_message(error, client.language)
    if trial is None:
        return gr.skip(), None, message(client.say("blind_none"), client.language)
    return page(client, trial=trial), Asked(run_id, trial), ""


def _vote(client: Client, asked: Asked | None, event: gr.EventData) -> tuple[Any, None, str]:
    """Keep the vote and tell the names. Without a trial (a second click) nothing happens."""
    choice = str(event._data.get("value"))
    if asked is None or choice not in VOTES:
        return gr.skip(), None, ""
    trial = asked.trial
    winner = {"left": trial.left, "right": trial.right, "tie": None}[choice]
    try:
        services().store.add_vote(asked.run_id, Vote(trial.prompt, trial.left, trial.right, winner))
        counted = tallied(asked.run_id)
    except QuantLabError as error:
        return gr.skip(), None, error_message(error, client.language)
    return page(client, trial=trial, choice=choice, counted=counted), None, ""


def start(client: Client, run_id: str) -> str:
    """The section before a pair is drawn: what it is for, and the votes so far."""
    return page(client, counted=tallied(run_id) if run_id else [])


def _candidates(run_id: str) -> list[Trial]:
    """Pairs of answers of the comparison and of what it was asked later."""
    if not run_id:
        return []
    at = services()
    rounds = [at.store.records(one) for one in (run_id, *at.answers_to(run_id))]
    return [trial for records in rounds for trial in trials(records, originals())]


def tallied(run_id: str) -> list[Tally]:
    return tally(services().store.votes(run_id), originals())


def originals() -> list[str]:
    """The variants that are not quantized, as records name them."""
    return [name for name, style in palette.STYLES.items() if style.reference]


def page(
    client: Client, *, trial: Trial | None = None, choice: str = "", counted: Sequence[Tally] = ()
) -> str:
    """The section: before a trial, during it (no names), or after the vote (`choice`)."""
    say = client.say
    sides = []
    if trial is not None:
        for side, variant, text in (
            ("left", trial.left, trial.left_text),
            ("right", trial.right, trial.right_text),
        ):
            # Nothing that leads to the variant may be in the page before the vote.
            name = palette.variant_label(variant) if choice else ""
            method = variant.partition(":")[0] if choice else ""
            sides.append({"side": side, "text": text, "name": name, "method": method})
    rows = [
        {
            "first": palette.variant_label(row.first),
            "second": palette.variant_label(row.second),
            "counts": (row.first_wins, row.second_wins, row.ties),
            "p": f"{row.p_value:.3f}" if row.first_wins + row.second_wins else "–",
        }
        for row in counted
    ]
    return render(
        "blind.html",
        client.language,
        prompt=trial.prompt if trial else "",
        sides=sides,
        choice=choice,
        told=say(f"blind_told_{choice}") if choice else "",
        rows=rows,
    )
