"""The Outputs tab: every variant's answer to the same prompts, side by side, as it is generated;
below them where they part and how they go on from there, what the variants made of the evaluation
text, token by token, and a blind test."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from quantlab.errors import QuantLabError
from quantlab.ui import blind, forks, form
from quantlab.ui.client import Client
from quantlab.ui.messages import error_message, message
from quantlab.ui.services import services
from quantlab.ui.shared import BUSY, QUIET, Shared, html, i18n


@dataclass
class Outputs:
    pieces: dict[str, Any] = field(default_factory=dict)


def build(shared: Shared) -> Outputs:
    """Lay the tab out: a question to the run in view on top, the answers below."""
    tab = Outputs()
    with gr.Row(elem_id="ask", equal_height=False):
        prompt = gr.Textbox(
            label=i18n("ask"),
            placeholder=i18n("ask_placeholder"),
            lines=1,
            max_lines=6,
            elem_id="ask-prompt",
            scale=6,
            min_width=220,
        )
        tokens = gr.Number(
            48, label=i18n("max_new_tokens"), elem_id="ask-tokens", scale=1, min_width=120
        )
        ask = gr.Button(
            i18n("ask_button"), variant="primary", elem_id="ask-button", scale=0, min_width=110
        )
    with gr.Row(elem_id="ask-state", equal_height=False):
        tab.pieces["ask_progress"] = html("ask-progress", scale=1)
        tab.pieces["ask_cancel"] = gr.Button(
            i18n("cancel"),
            variant="stop",
            elem_id="ask-cancel",
            visible=False,
            size="sm",
            scale=0,
            min_width=110,
        )
    notice = html("ask-message", "quantlab.message(element, watch)")
    tab.pieces["answers_intro"] = html("answers-intro")
    tab.pieces["answers_autopsy"] = html("answers-autopsy")
    tab.pieces["answers"] = html("answers")
    tab.pieces |= forks.build(shared)
    with gr.Accordion(i18n("tokens"), open=False, elem_id="tokens-section") as reading:
        tab.pieces["tokens"] = html("tokens", "quantlab.tokens(element, watch)")
    tab.pieces |= blind.build(shared)

    asked = gr.on(
        [ask.click, prompt.submit],
        _ask,
        [shared.client, shared.run_id, prompt, tokens],
        [prompt, notice],
        **BUSY,
    )
    shared.repaint.append(asked)
    shared.repaint.append(reading.expand(lambda: True, None, shared.opened, **QUIET))
    shared.repaint.append(tab.pieces["ask_cancel"].click(_cancel, shared.run_id, None, **QUIET))
    return tab


def _ask(client: Client, run_id: str, text: str, tokens: float | None) -> tuple[Any, str]:
    """Queue the question; the prompt stays in its box when it cannot be asked."""
    say = client.say
    prompts = form.lines(text)
    problem = "" if run_id else say("ask_none")
    if not problem and not prompts:
        problem = say("ask_empty")
    if not problem and (tokens is None or tokens != int(tokens) or tokens < 1):
        problem = say("error_whole", field=say("max_new_tokens"))
    if problem or tokens is None:
        return gr.skip(), message(problem, client.language, "error")
    try:
        parent = services().store.run(run_id)
        if not any(record.status == "finished" for record in parent.records):
            return gr.skip(), message(say("ask_not_ready"), client.language, "error")
        spec = dataclasses.replace(
            parent.spec, variants=(), prompts=prompts, max_new_tokens=int(tokens)
        )
        queue = services().queue
        answer = queue.submit(spec, kind="answer", parent=run_id)
        services().history(fresh=True)
        position = queue.view(answer).position
    except QuantLabError as error:
        return gr.skip(), error_message(error, client.language)
    waits = position > 0 and queue.active() not in (None, answer)
    note = say("run_queued", position=position) if waits else say("ask_started")
    return "", message(note, client.language)


def _cancel(run_id: str) -> None:
    """Cancel the answers to this run that are queued or being generated."""
    for answer in services().answers_to(run_id):
        services().queue.cancel(answer)
