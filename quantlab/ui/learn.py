"""The Learn tab: walkthroughs of short steps, computed on real pieces of a model.

Nothing here takes long: a step is drawn when it is opened and when something on it is moved; where
answers cross, it is drawn once more (`asking`). The slices of another model come from a process of
their own (`lessons.source`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gradio as gr
from gradio.events import api as offer

from quantlab.errors import QuantLabError
from quantlab.plots.templates import render
from quantlab.ui.asking import ask
from quantlab.ui.client import Client
from quantlab.ui.learn_step import Stage, build_step, moved, scene_of
from quantlab.ui.lessons import LESSONS, api
from quantlab.ui.lessons.base import Lesson
from quantlab.ui.lessons.source import Source, build_source, origin_html
from quantlab.ui.messages import error_message
from quantlab.ui.shared import QUIET, Shared, html

FIRST = next(iter(LESSONS))
PLACE = "learn"
"""The open step and what is around it, for `asking`."""
MOVING: dict[str, Any] = {**QUIET, "trigger_mode": "always_last"}
"""Events of what moves: while one answer is on its way, only the latest wish is remembered."""


@dataclass
class Learn:
    """`where` is {"lesson": name, "steps": {name: number}}; `states` the lessons' own; `stages` all
    steps, by lesson. `redraw` paints the open step after an event."""

    shared: Shared
    where: Any
    nav: Any
    source: Source
    states: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    walks: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, list[Stage]] = field(default_factory=dict)

    @property
    def all_stages(self) -> list[Stage]:
        return [stage for stages in self.stages.values() for stage in stages]

    def redraw(self, event: Any) -> Any:
        """After `event`, paint the open step and the list of lessons; returns the new event."""
        return ask(PLACE, event.then, self._paint, *self._painted(), **QUIET)

    def follow(self, state: Any) -> None:
        """Paint the same when a gr.State has changed; one answer after the other."""
        ask(PLACE, state.change, self._paint, *self._painted(), **MOVING)

    def _painted(self) -> tuple[list[Any], list[Any]]:
        """Inputs and outputs of `_paint`."""
        inputs = [
            self.shared.client,
            self.shared.run_id,
            self.source.chosen,
            self.where,
            *self.states.values(),
            *(control for stage in self.all_stages for control in stage.controls),
        ]
        outputs = [
            self.nav,
            self.source.origin,
            *(one for stage in self.all_stages for one in stage.outputs),
        ]
        return inputs, outputs

    def _paint(
        self,
        client: Client,
        run_id: str,
        chosen: Mapping[str, str],
        where: Mapping[str, Any],
        *rest: Any,
    ) -> dict[Any, Any]:
        lesson, number = place(where)
        stage = self.stages[lesson][number - 1]
        kept = rest[list(LESSONS).index(lesson)]
        given = iter(rest[len(LESSONS) :])
        values: list[Any] = []
        for one in self.all_stages:
            taken = [next(given) for _ in one.controls]
            values = taken if one is stage else values
        made = moved(stage, client, run_id, chosen, kept, values)
        return {
            self.nav: nav_html(client, lesson, number),
            self.source.origin: origin_html(client, chosen),
            **dict(zip(stage.outputs, made, strict=True)),
        }

    def arrive(self, linked: Any, tabs: Any) -> None:
        """After the event `linked`, which comes when the page was opened by a link to a step, show
        it. Else a step is drawn when the tab is opened: nothing of Learn is computed, nor are its
        many components told anything, for those who do not open it."""
        outputs = [tabs, self.where, *self.columns.values(), *self.walks.values()]

        def find(client: Client) -> list[Any]:
            if client.lesson not in LESSONS:
                return [gr.skip() for _ in outputs]
            last = len(LESSONS[client.lesson].steps)
            number = min(max(client.step, 1), last)
            where = {"lesson": client.lesson, "steps": {client.lesson: number}}
            walks = [
                gr.Walkthrough(selected=number) if name == client.lesson else gr.skip()
                for name in LESSONS
            ]
            return [gr.Tabs(selected="learn"), where, *visible(client.lesson), *walks]

        self.redraw(linked(find, self.shared.client, outputs, **QUIET))


def build(shared: Shared) -> Learn:
    """Lay the tab out and connect what happens within it."""
    where = gr.State({"lesson": FIRST, "steps": {}})
    with gr.Row(elem_id="learn", equal_height=False):
        with gr.Column(scale=1, min_width=230, elem_id="learn-side"):
            nav = html(
                "learn-nav",
                "quantlab.followLesson(element, watch); quantlab.lesson(element, trigger, watch);"
                f"quantlab.again(['{PLACE}'], trigger)",
                events=("act", "again"),
                value=nav_html(Client(), FIRST, 1),
            )
        with gr.Column(scale=4, min_width=320, elem_id="learn-main"):
            source = build_source(shared)
            tab = Learn(shared, where, nav, source)
            for lesson in LESSONS.values():
                _lesson(tab, lesson)
    _connect(tab)
    for function in api.FUNCTIONS:
        offer(function, api_name=function.__name__, queue=False)
    return tab


# Layout


def _lesson(tab: Learn, lesson: Lesson) -> None:
    tab.states[lesson.name] = gr.State(dict(lesson.start))
    tab.stages[lesson.name] = []
    with gr.Column(
        visible=lesson.name == FIRST, elem_id=f"lesson-{lesson.name}", elem_classes="ql-lesson"
    ) as column:
        tab.columns[lesson.name] = column
        with gr.Walkthrough(selected=1, elem_id=f"walk-{lesson.name}") as walk:
            tab.walks[lesson.name] = walk
            for number, step in enumerate(lesson.steps, 1):
                tab.stages[lesson.name].append(build_step(lesson, step, number))


# Drawing


def place(where: Mapping[str, Any]) -> tuple[str, int]:
    """The open lesson and the number of its open step."""
    lesson = str(where["lesson"])
    return lesson, int(where["steps"].get(lesson, 1))


def visible(lesson: str) -> list[Any]:
    """Updates of the lessons' columns: one is shown."""
    return [gr.Column(visible=name == lesson) for name in LESSONS]


def nav_html(client: Client, lesson: str, step: int) -> str:
    return render(
        "lesson_nav.html", client.language, lessons=list(LESSONS), current=lesson, step=step
    )


# What happens


def _connect(tab: Learn) -> None:
    for stage in tab.all_stages:
        _connect_stage(tab, stage)
        for event, number, programmatic in stage.openings:
            _connect_opening(tab, stage.lesson.name, event, number, programmatic)
    chosen = tab.nav.act(_choose, tab.where, [tab.where, *tab.columns.values()], **QUIET)
    tab.redraw(chosen)
    ask(PLACE, tab.nav.again, tab._paint, *tab._painted(), **QUIET)
    for event in tab.source.changed:
        tab.redraw(event)
    tab.follow(tab.source.chosen)


def _connect_stage(tab: Learn, stage: Stage) -> None:
    state = tab.states[stage.lesson.name]
    inputs = [
        tab.shared.client,
        tab.shared.run_id,
        tab.source.chosen,
        state,
        *stage.controls,
    ]
    if stage.controls:
        # A text's `input` still carries what the field held before.
        events = [
            shown.change if control.kind == "text" else shown.input
            for control, shown in zip(stage.step.controls, stage.controls, strict=True)
        ]
        ask(PLACE, partial(gr.on, events), _moving(stage), inputs, stage.outputs, **MOVING)
    if stage.step.act is not None:
        outputs = [state, *stage.controls, *stage.outputs]
        ask(PLACE, stage.picture.act, _answering(stage), inputs, outputs, **QUIET)


def _moving(stage: Stage) -> Callable[..., list[Any]]:
    """The handler of the step's controls."""

    def move(
        client: Client, run_id: str, chosen: Mapping[str, str], kept: Any, *given: Any
    ) -> list[Any]:
        return moved(stage, client, run_id, chosen, kept, given)

    return move


def _answering(stage: Stage) -> Callable[..., list[Any]]:
    """The handler of a click or an edit in the step's own markup."""
    act = stage.step.act
    assert act is not None
    names = [control.name for control in stage.step.controls]

    def answer(
        event: gr.EventData,
        client: Client,
        run_id: str,
        chosen: Mapping[str, str],
        kept: Any,
        *given: Any,
    ) -> list[Any]:
        # The event comes first, because Gradio puts it where the signature has it.
        try:
            scene = scene_of(client, run_id, chosen, stage.step, kept, given)
            changes = act(scene, str(event._data["value"]))
        except (QuantLabError, ValueError) as error:
            shown = moved(stage, client, run_id, chosen, kept, given)
            shown[1] = error_message(as_message(error), client.language) + shown[1]
            return [gr.skip(), *(gr.skip() for _ in names), *shown]
        values = [changes.get(name, value) for name, value in zip(names, given, strict=True)]
        kept = {**kept, **{key: new for key, new in changes.items() if key not in names}}
        shown = moved(stage, client, run_id, chosen, kept, values)
        return [kept, *(changes.get(name, gr.skip()) for name in names), *shown]

    return answer


def as_message(error: Exception) -> QuantLabError:
    return error if isinstance(error, QuantLabError) else QuantLabError(str(error))


def _choose(where: Mapping[str, Any], event: gr.EventData) -> list[Any]:
    """A lesson was chosen: show it, at the step where it stands."""
    name = str(event._data["value"])
    name = name if name in LESSONS else FIRST
    return [{**where, "lesson": name}, *visible(name)]


def _connect_opening(tab: Learn, lesson: str, event: Any, number: int, programmatic: bool) -> None:
    def opened(where: Mapping[str, Any]) -> Any:
        there = {"lesson": lesson, "steps": {**where["steps"], lesson: number}}
        return [there, gr.Walkthrough(selected=number)] if programmatic else there

    outputs = [tab.where, tab.walks[lesson]] if programmatic else [tab.where]
    tab.redraw(event(opened, tab.where, outputs, **QUIET))
