"""Fills the page: what the run in view looks like now, and only the pieces that have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from gradio.components.plot import PlotData

from quantlab.errors import JobError, QuantLabError
from quantlab.jobs import JobView
from quantlab.plots import FIGURES, autopsy, figures, pairs, tokens
from quantlab.plots.templates import render
from quantlab.results import ResultRecord
from quantlab.runs import ACTIVE
from quantlab.ui import blind, calibration_lab, forks, views
from quantlab.ui.client import Client
from quantlab.ui.messages import error_message
from quantlab.ui.services import Services, environment, services
from quantlab.ui.shared import WANTED

FAST, SLOW = 0.5, 4.0
"""Seconds between two looks while something goes on, and while nothing does."""

ANSWERS = 12
"""Later questions that the Outputs tab shows, newest first."""


@dataclass
class Painting:
    """What has changed: piece -> new value. `marks` are fingerprints of all that is shown."""

    marks: dict[str, str]
    changed: dict[str, Any] = field(default_factory=dict)

    def put(self, piece: str, mark: object, value: Any) -> None:
        """Show `value` unless the piece already carries this mark; `value` may be a function."""
        if not self.same(piece, mark):
            self.marks[piece] = _fingerprint(mark)
            self.changed[piece] = value() if callable(value) else value

    def same(self, piece: str, mark: object) -> bool:
        """Whether the piece already carries this mark."""
        return self.marks.get(piece) == _fingerprint(mark)

    def html(self, piece: str, value: str) -> None:
        self.put(piece, value, value)


def _fingerprint(mark: object) -> str:
    return hashlib.sha256(repr(mark).encode()).hexdigest()[:16]


def paint(
    client: Client,
    run_id: str,
    painted: Mapping[str, str],
    fork: str = "",
    *,
    first: bool = False,
) -> Painting:
    """The page as it should look for this run, the precomputed one for ''. `first` leaves out what
    can wait until the table is seen. Errors of the store become the progress line."""
    painting = Painting(dict(painted))
    painting.html("variants_title", render("variants_title.html", client.language))
    try:
        _paint(painting, client, run_id, services(), fork, first)
    except QuantLabError as error:
        painting.html("progress", error_message(error, client.language))
    return painting


def _paint(
    painting: Painting, client: Client, run_id: str, at: Services, fork: str, first: bool
) -> None:
    view = at.view(run_id)
    run_id = "" if view.run.shipped else view.run.id
    own = bool(run_id)
    busy = at.queue.active() is not None or bool(at.queue.waiting())
    painting.put("timer", busy, lambda: gr.Timer(FAST if busy else SLOW))
    painting.html("header", views.header(client, view.run, environment()))
    painting.html("queue", views.queue(client, at, run_id))
    painting.html(
        "progress", views.progress(client, view) if own else views.shipped(client, view.run)
    )
    # Drawing the table takes longer than all else that may change twice a second.
    where = [(v.state, v.stage, v.done, v.total) for v in view.variants if v.record is None]
    settled = [(r.variant, r.status) for r in view.run.records]
    known = (view.run.id, settled, where, client.language)
    painting.put("table", known, lambda: views.table(client, view))
    active = view.status in ACTIVE
    painting.html("verdict", views.verdict(client, view))
    painting.put("cancel", active, lambda: gr.Button(visible=active))
    if first:
        return
    history = at.history()
    painting.put(
        "runs",
        (client.language, view.run.id, [(run.id, run.status) for run in history]),
        lambda: views.runs(client, history, run_id),
    )
    painting.html("detail", views.detail(client, view.run))
    painting.html("facts", views.facts(client, view.run))
    for piece, kind in (("exports", gr.Row), ("delete", gr.Button)):
        painting.put(piece, own, lambda kind=kind: kind(visible=own))
    _paint_figures(painting, client, view)
    _paint_answers(painting, client, view, at)
    painting.html("forks", forks.page(client, view, at, fork))
    _paint_judging(painting, client, view)
    calibration_lab.repaint(painting, client, at)


def _answering(at: Services, run_id: str) -> JobView | None:
    try:
        return at.queue.view(run_id)
    except JobError:
        return None  # Deleted, here or in another tab.


def _paint_figures(painting: Painting, client: Client, view: JobView) -> None:
    records = [v.record for v in view.variants if v.record]
    done = figures.finished(records)
    painting.put("figures", bool(done), lambda: gr.Column(visible=bool(done)))
    if not done:
        return
    mark = (view.run.id, [r.variant for r in done], client.language, client.dark)
    names = figures.drawn(records)
    trained = "training" in names
    painting.put("training", trained, lambda: gr.Row(visible=trained))
    for name in names:
        painting.put(f"figure_{name}", mark, lambda name=name: _figure(client, view, records, name))


def _figure(client: Client, view: JobView, records: Sequence[ResultRecord], name: str) -> PlotData:
    drawn = FIGURES[name](records, client.dark, client.language)
    if view.run.shipped:
        figures.mark(drawn, client.say("badge_precomputed"))
    return PlotData(type="plotly", plot=figures.to_json(drawn))


def _paint_answers(painting: Painting, client: Client, view: JobView, at: Services) -> None:
    later = at.answers_to(view.run.id)[:ANSWERS]
    asked = [one for answer in later if (one := _answering(at, answer)) is not None]
    going = next((one for one in asked if one.status in ACTIVE), None)
    html = views.answers(client, [*asked, view])
    painting.html("answers", html)
    intro = render("answers_intro.html", client.language) if "ql-column" in html else ""
    note = views.shipped(client, view.run) if view.run.shipped else ""
    painting.html("answers_intro", note + intro)
    painting.html("ask_progress", views.progress(client, going) if going else "")
    painting.put("ask_cancel", going is not None, lambda: gr.Button(visible=going is not None))


def _paint_judging(painting: Painting, client: Client, view: JobView) -> None:
    """What is drawn anew only when a record has come: it is too much for twice a second. The paired
    tokens are the largest piece of all, and are drawn only for those who have opened them."""
    records = [v.record for v in view.variants if v.record]
    done = [record.variant for record in figures.finished(records)]
    mark = (view.run.id, done, client.language)
    if WANTED in painting.marks:
        painting.put("tokens", mark, lambda: tokens.view(records, client.language))
    run_id = "" if view.run.shipped else view.run.id
    painting.put("blind", mark, lambda: blind.start(client, run_id))
    settled = (mark, [record.variant for record in records])
    painting.put("pairs_section", mark, lambda: gr.Accordion(visible=bool(pairs.pairs(records))))
    painting.put("pairs", mark, lambda: pairs.box(records, client.language))
    for piece in ("autopsy", "answers_autopsy"):
        painting.put(piece, settled, lambda: autopsy.box(records, client.language))
