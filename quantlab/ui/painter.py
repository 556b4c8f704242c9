"""Fills the page: what the run in view looks like now, and only the pieces that have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from gradio.components.plot import PlotData

from quantlab.errors import JobError, QuantLabError
from quantlab.jobs import JobView
from quantlab.plots import FIGURES, autopsy, figures, pairs, tokens
from quantlab.plots.templates import render
from quantlab.runs import ACTIVE
from quantlab.ui import blind, calibration_lab, forks, views
from quantlab.ui.client import Client
from quantlab.ui.messages import error_message
from quantlab.ui.services import Services, environment, services

FAST, SLOW = 0.5, 2.0
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


def paint(client: Client, run_id: str, painted: Mapping[str, str], fork: str = "") -> Painting:
    """The page as it should look for this run. Errors of the store become the progress line."""
    painting = Painting(dict(painted))
    painting.html("variants_title", render("variants_title.html", client.language))
    try:
        _paint(painting, client, run_id, services(), fork)
    except QuantLabError as error:
        painting.html("progress", error_message(error, client.language))
    return painting


def _paint(painting: Painting, client: Client, run_id: str, at: Services, fork: str) -> None:
    view = _view(at, run_id)
    history = at.history()
    busy = at.queue.active() is not None or bool(at.queue.waiting())
    painting.put("timer", busy, gr.Timer(FAST if busy else SLOW))
    painting.html("header", views.header(client, view.run if view else None, environment()))
    painting.html("queue", views.queue(client, at, run_id))
    painting.put(
        "runs",
        (client.language, run_id, [(run.id, run.status) for run in history]),
        lambda: views.runs(client, history, run_id),
    )
    painting.html("progress", views.progress(client, view) if view else "")
    painting.html("verdict", views.verdict(client, view) if view else "")
    painting.html("table", views.table(client, view) if view else "")
    painting.html("empty", "" if view else views.empty(client))
    painting.html("detail", views.detail(client, view.run) if view else "")
    painting.html("facts", views.facts(client, view.run) if view else "")
    shown = view is not None
    painting.put("detail_column", shown, gr.Column(visible=shown))
    active = view is not None and view.status in ACTIVE
    painting.put("cancel", active, gr.Button(visible=active))
    _paint_figures(painting, client, view)
    _paint_answers(painting, client, view, at)
    painting.html("forks", forks.page(client, view, at, fork))
    _paint_judging(painting, client, view)
    calibration_lab.repaint(painting, client, at)


def _view(at: Services, run_id: str) -> JobView | None:
    if not run_id:
        return None
    try:
        return at.queue.view(run_id)
    except JobError:
        return None  # Deleted, here or in another tab.


def _paint_figures(painting: Painting, client: Client, view: JobView | None) -> None:
    records = [v.record for v in view.variants if v.record] if view else []
    done = figures.finished(records)
    painting.put("figures", bool(done), gr.Column(visible=bool(done)))
    if view is None or not done:
        return
    mark = (view.run.id, [r.variant for r in done], client.language, client.dark)
    names = figures.drawn(records)
    painting.put("training", "training" in names, gr.Row(visible="training" in names))
    for name in names:
        painting.put(
            f"figure_{name}",
            mark,
            lambda draw=FIGURES[name]: PlotData(
                type="plotly", plot=figures.to_json(draw(records, client.dark, client.language))
            ),
        )


def _paint_answers(painting: Painting, client: Client, view: JobView | None, at: Services) -> None:
    later = at.answers_to(view.run.id)[:ANSWERS] if view else []
    asked = [one for answer in later if (one := _view(at, answer)) is not None]
    going = next((one for one in asked if one.status in ACTIVE), None)
    every = [*asked, view] if view else []
    html = views.answers(client, every)
    painting.html("answers", html)
    intro = render("answers_intro.html", client.language) if "ql-column" in html else ""
    painting.html("answers_intro", intro)
    painting.html("ask_progress", views.progress(client, going) if going else "")
    painting.put("ask_cancel", going is not None, gr.Button(visible=going is not None))


def _paint_judging(painting: Painting, client: Client, view: JobView | None) -> None:
    """What is drawn anew only when a record has come: it is too much for twice a second."""
    records = [v.record for v in view.variants if v.record] if view else []
    done = [record.variant for record in figures.finished(records)]
    mark = (view.run.id if view else "", done, client.language)
    painting.put("tokens", mark, lambda: tokens.view(records, client.language))
    painting.put("blind", mark, lambda: blind.start(client, view.run.id if view else ""))
    settled = (mark, [record.variant for record in records])
    painting.put("pairs_section", mark, lambda: gr.Accordion(visible=bool(pairs.pairs(records))))
    painting.put("pairs", mark, lambda: pairs.box(records, client.language))
    for piece in ("autopsy", "answers_autopsy"):
        painting.put(piece, settled, lambda: autopsy.box(records, client.language))
