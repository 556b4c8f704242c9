"""The fork explorer in the Outputs tab: answers aligned where they leave the original's, and the
original's token forced there, fork after fork."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from quantlab import forks
from quantlab.errors import JobError, QuantLabError
from quantlab.jobs import JobView
from quantlab.plots import palette, tokens
from quantlab.plots.fragments import visible
from quantlab.plots.templates import render
from quantlab.plots.words import Words
from quantlab.results import ResultRecord
from quantlab.runs import ACTIVE, Run
from quantlab.types import Choice, Generation
from quantlab.ui import views
from quantlab.ui.client import Client
from quantlab.ui.messages import error_message
from quantlab.ui.services import Services, services
from quantlab.ui.shared import BUSY, Shared, html, i18n

CONTEXT = 56
"""Characters of the shared text that are shown before a fork."""


@dataclass(frozen=True)
class Topic:
    """One prompt of a comparison or of a later round of answers, with the original's answer."""

    round: Run
    index: int
    original: Generation

    @property
    def key(self) -> str:
        return f"{self.round.id}:{self.index}"


def build(shared: Shared) -> dict[str, Any]:
    """Lay the section out and connect it; the piece that the painter fills."""
    with gr.Accordion(i18n("forks"), open=False, elem_id="forks-section"):
        box = html("forks", "quantlab.lesson(element, trigger, watch)", events=("act",))
        notice = html("forks-message", "quantlab.message(element, watch)")
    acted = box.act(
        _act, [shared.client, shared.run_id, shared.fork], [shared.fork, notice], **BUSY
    )
    shared.repaint.append(acted)
    return {"forks": box}


def _act(client: Client, run_id: str, fork: str, event: gr.EventData) -> tuple[Any, str]:
    """A click: `pick:TOPIC`, `force:TOPIC:AT:VARIANT` or `stop:RUN`."""
    verb, _, rest = str(event._data.get("value")).partition(":")
    try:
        if verb == "pick":
            return rest, ""
        if verb == "stop":
            services().queue.cancel(rest)
        elif verb == "force":
            _force(services(), run_id, rest)
    except QuantLabError as error:
        return gr.skip(), error_message(error, client.language)
    return gr.skip(), ""


def _force(at: Services, run_id: str, what: str) -> None:
    """Queue the answer that goes on behind the original's token. Raises: JobError."""
    round_id, index, place, variant = what.split(":", 3)
    comparison = at.store.run(run_id)
    topic = next(
        (t for t in topics(at, comparison) if (t.round.id, t.index) == (round_id, int(index))), None
    )
    if topic is None:
        raise JobError("the answers to this prompt are gone; choose another prompt")
    forced = topic.original.tokens[: int(place) + 1]
    spec = forks.forcing(comparison, topic.round, topic.index, variant, forced)
    at.queue.submit(spec, kind="answer", parent=run_id)
    at.history(fresh=True)


def topics(at: Services, comparison: Run) -> list[Topic]:
    """What can be explored, the newest question first: prompts that the original and a quantized
    variant have answered."""
    found = []
    for one in [*at.answers(comparison.id), comparison]:
        for index in range(len(one.spec.prompts)):
            known = [r for r in one.records if _output(r, index) is not None]
            originals = [r for r in known if palette.is_reference(r)]
            if originals and len(known) > len(originals):
                answer = _output(originals[0], index)
                assert answer is not None
                found.append(Topic(one, index, answer))
    return found


def _output(record: ResultRecord, index: int) -> Generation | None:
    if record.status != "finished" or index >= len(record.outputs):
        return None
    return record.outputs[index]


def page(client: Client, view: JobView | None, at: Services, fork: str) -> str:
    """The section for the run in view and the chosen topic (the first, if that is not there)."""
    known = topics(at, view.run) if view else []
    topic = next((one for one in known if one.key == fork), known[0] if known else None)
    shown = []
    if topic is not None and view is not None:
        forced = at.answers(view.run.id, forced=True)
        for record in topic.round.records:
            answer = _output(record, topic.index)
            if answer is None or palette.is_reference(record):
                continue
            own = [run for run in forced if run.spec.variants[0].label == record.variant]
            chain = forks.chain(topic.original, answer, own, topic.round.spec.max_new_tokens)
            shown.append(_chain(chain, record, topic, at, client))
    return render(
        "forks.html",
        client.language,
        topics=[
            {"key": one.key, "prompt": one.original.prompt, "chosen": one == topic} for one in known
        ],
        prompt=topic.original.prompt if topic else "",
        chains=shown,
        near=f"{100 * tokens.NEAR_TIE:.0f}%",
    )


def _chain(
    chain: forks.Chain, record: ResultRecord, topic: Topic, at: Services, client: Client
) -> dict[str, Any]:
    say = client.say
    total = len(topic.original.tokens)
    own = chain.links[-1].at
    forced = sum(link.forced > 0 for link in chain.links)
    same = len(chain.links[-1].answer.tokens) if own is None else own
    summary = say("forks_same", total=total) if own is None and not forced else ""
    if not summary:
        key = "forks_summary" if forced else "forks_part"
        summary = say(key, same=min(same, total), total=total, forced=forced)
    place = chain.next_forced()
    pending = _pending(chain.pending, at, client)
    return {
        "variant": record.variant,
        "method": record.method,
        "label": palette.short(record),
        "summary": summary,
        "links": [_link(link, topic.original, say) for link in chain.links],
        "pending": pending,
        "act": ""
        # What came with QuantLab has no weights here that could go on.
        if place is None or topic.round.shipped or (pending and pending["active"])
        else f"force:{topic.key}:{len(place) - 1}:{record.variant}",
        "token": _token(topic.original, len(place) - 1)[0] if place else "",
        "ended": own is not None and place is None,
    }


def _link(link: forks.Link, original: Generation, say: Words) -> dict[str, Any]:
    """One fork: what stands before it, both branches, and what each model thought of."""
    spoken = say("forks_own", count=link.agreed)
    if link.forced:
        word = _token(original, link.forced - 1)[0]
        spoken = say("forks_forced", token=word, count=link.agreed)
    if link.at is None:
        return {"spoken": spoken, "at": None, "end": say("forks_end") if link.forced else ""}
    ours, theirs = forks.choices_at(original, link.at), forks.choices_at(link.answer, link.at)
    return {
        "spoken": spoken,
        "at": link.at,
        "before": _before(original.pieces[: link.at]),
        "branches": [
            _branch(say("tokens_original"), original, link.at, True),
            _branch(say("forks_variant"), link.answer, link.at, False),
        ],
        "flip": tokens.flip(_chances(ours), _chances(theirs)) if ours and theirs else "",
        "tops": [_tops(ours), _tops(theirs)] if ours and theirs else [],
    }


def _before(pieces: Sequence[str]) -> str:
    text = "".join(pieces).replace("\n", "⏎")
    return text if len(text) <= CONTEXT else f"…{text[-CONTEXT:]}"


def _branch(name: str, answer: Generation, at: int, original: bool) -> dict[str, Any]:
    """The token at a fork, ringed, and what follows."""
    token, after = _token(answer, at)
    rest = "".join(answer.pieces[after:])
    return {"name": name, "original": original, "token": token, "rest": rest}


def _token(answer: Generation, at: int) -> tuple[str, int]:
    """A token as a person can see it, and where the next one begins: a letter of several tokens
    shows whole. ∎ where the answer ended."""
    after = min(at + 1, len(answer.pieces))
    while after < len(answer.pieces) and not "".join(answer.pieces[at:after]):
        after += 1
    return visible("".join(answer.pieces[at:after])), after


def _tops(top: Sequence[Choice]) -> list[dict[str, str]]:
    return [{"text": visible(text), "share": f"{100 * chance:.1f}"} for _, chance, text in top]


def _chances(top: Sequence[Choice]) -> list[tuple[int, float]]:
    return [(token, chance) for token, chance, _ in top]


def _pending(run: Run | None, at: Services, client: Client) -> dict[str, Any] | None:
    """The forced answer that is on its way, with its text so far; or why there is none."""
    if run is None:
        return None
    view = at.queue.view(run.id)
    record = next((r for r in view.run.records if r.error), None)
    active = view.status in ACTIVE
    return {
        "run": run.id,
        "active": active,
        "progress": Markup(views.progress(client, view)) if active or record is None else "",
        "text": view.variants[0].outputs[0] if active else "",
        "error": record.error if record else None,
        "hint": record.hint if record else None,
    }
