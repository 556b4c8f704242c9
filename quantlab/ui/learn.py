"""The Learn tab: walkthroughs of short steps, computed on real pieces of a model.

Nothing here takes long: a step is drawn when it is opened and when something on it is moved. The
slices of another model come from a process of their own (`capturing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.plot import PlotData
from gradio.events import api as offer
from markupsafe import Markup

from quantlab.errors import QuantLabError
from quantlab.learn import material, records
from quantlab.plots import figures
from quantlab.plots.templates import render
from quantlab.plots.terms import paragraphs
from quantlab.ui.client import Client
from quantlab.ui.lessons import LESSONS, api
from quantlab.ui.lessons.base import Control, Lesson, Scene, Shown, Step, safely
from quantlab.ui.lessons.source import Source, build_source, origin_html
from quantlab.ui.messages import error_message
from quantlab.ui.services import services
from quantlab.ui.shared import BUSY, QUIET, Shared, html, i18n

FIRST = next(iter(LESSONS))
MOVING: dict[str, Any] = {**QUIET, "trigger_mode": "always_last"}
"""Events of what moves: while one answer is on its way, only the latest wish is remembered."""


@dataclass
class Stage:
    """The components of one step."""

    lesson: Lesson
    step: Step
    number: int
    text: Any = None
    picture: Any = None
    figure: Any = None
    controls: list[Any] = field(default_factory=list)
    openings: list[tuple[Any, int, bool]] = field(default_factory=list)
    """Events that open a step of the lesson, its number, and whether the walkthrough has to be
    told (a click on the step itself has moved it already)."""

    @property
    def outputs(self) -> list[Any]:
        return [one for one in (self.text, self.picture, self.figure) if one is not None]


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
        return event.then(self._paint, inputs, outputs, **QUIET)

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

    def arrive(self, event: Any, tabs: Any) -> None:
        """When the page is opened by a link to a step, show it."""
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

        event.then(find, self.shared.client, outputs, **BUSY)
        # Changes only where the page was opened by such a link; else the step is drawn when the tab
        # is opened, and nothing of Learn is computed for those who do not open it.
        self.redraw(self.where.change(lambda: None, **QUIET))


def build(shared: Shared) -> Learn:
    """Lay the tab out and connect what happens within it."""
    where = gr.State({"lesson": FIRST, "steps": {}})
    with gr.Row(elem_id="learn", equal_height=False):
        with gr.Column(scale=1, min_width=230, elem_id="learn-side"):
            nav = html(
                "learn-nav",
                "quantlab.followLesson(element, watch); quantlab.lesson(element, trigger, watch)",
                events=("act",),
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
                _step(tab, lesson, step, number)


def _step(tab: Learn, lesson: Lesson, step: Step, number: int) -> None:
    stage = Stage(lesson, step, number)
    tab.stages[lesson.name].append(stage)
    name = f"{lesson.name}-{step.name.replace('_', '-')}"
    with (
        gr.Step(
            i18n(f"learn_{lesson.name}_{step.name}_step"), id=number, elem_id=f"step-{name}"
        ) as opened,
        gr.Row(equal_height=False, elem_classes="ql-step-row"),
    ):
        with gr.Column(scale=2, min_width=290, elem_classes="ql-step-side"):
            stage.text = html(f"text-{name}", value=text_html(Client(), lesson, step))
            stage.controls = [_control(one, name) for one in step.controls]
            with gr.Row(elem_classes="ql-step-move"):
                back = gr.Button(
                    i18n("learn_back"), size="sm", min_width=90, interactive=number > 1
                )
                onward = gr.Button(
                    i18n("learn_next"),
                    size="sm",
                    min_width=90,
                    variant="primary",
                    interactive=number < len(lesson.steps),
                )
        with gr.Column(scale=5, min_width=320, elem_classes="ql-step-picture"):
            if step.figure:
                stage.figure = gr.Plot(
                    show_label=False,
                    container=False,
                    elem_id=f"figure-{name}",
                    elem_classes="ql-figure",
                )
            stage.picture = html(
                f"picture-{name}", "quantlab.lesson(element, trigger, watch)", events=("act",)
            )
    stage.openings = [(opened.select, number, False)]
    if number > 1:
        stage.openings.append((back.click, number - 1, True))
    if number < len(lesson.steps):
        stage.openings.append((onward.click, number + 1, True))


def _control(control: Control, step: str) -> Any:
    common: dict[str, Any] = {
        "label": i18n(f"learn_{control.name}"),
        "info": i18n(f"learn_{control.name}_info") if control.info else None,
        "elem_id": f"{step}-{control.name.replace('_', '-')}",
    }
    if control.kind == "slider":
        return gr.Slider(
            control.minimum, control.maximum, control.value, step=control.step, **common
        )
    if control.kind == "radio":
        choices = [
            (i18n(f"learn_{control.name}_{one}") if isinstance(one, str) else str(one), one)
            for one in control.choices
        ]
        return gr.Radio(choices, value=control.value, **common)
    if control.kind == "check":
        return gr.Checkbox(control.value, **common)
    return gr.Textbox(
        control.value, placeholder=i18n(f"learn_{control.name}_placeholder"), lines=1, **common
    )


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


def text_html(client: Client, lesson: Lesson, step: Step) -> str:
    """The step's title and prose, its terms explained on hover."""
    key = f"learn_{lesson.name}_{step.name}"
    return render(
        "lesson_text.html",
        client.language,
        title=client.say(f"{key}_title"),
        paragraphs=paragraphs(client.say(f"{key}_text"), client.say),
    )


def scene_of(
    client: Client, run_id: str, chosen: Mapping[str, str], step: Step, state: Any, given: Any
) -> Scene:
    """What the step is drawn from; a control that was emptied counts as its default."""
    values = {
        control.name: control.value if value is None else value
        for control, value in zip(step.controls, given, strict=True)
    }
    file = Path(chosen["file"]) if chosen.get("file") else material.BUNDLED
    return Scene(
        client, material.load(file, chosen.get("layer", "")), values, state, measured(run_id)
    )


def measured(run_id: str) -> records.Measured | None:
    """The finished records of a run; None where there is none."""
    if not run_id:
        return None
    try:
        run = services().store.run(run_id)
    except QuantLabError:
        return None
    found = records.of(run.records, run.environment)
    return found if found.records else None


def drawn(stage: Stage, scene: Scene) -> list[Any]:
    """Values for the stage's outputs."""
    return parts(stage, scene.client, safely(stage.step, scene))


def parts(stage: Stage, client: Client, shown: Shown) -> list[Any]:
    facts = render(
        "lesson_facts.html", client.language, picture=Markup(shown.html), facts=shown.facts
    )
    made: list[Any] = [text_html(client, stage.lesson, stage.step), facts]
    if stage.figure is not None:
        plot = None
        if shown.figure is not None:
            plot = PlotData(type="plotly", plot=figures.to_json(shown.figure))
        made.append(plot)
    return made


# What happens


def moved(
    stage: Stage,
    client: Client,
    run_id: str,
    chosen: Mapping[str, str],
    kept: Any,
    given: Sequence[Any],
) -> list[Any]:
    """Values for the stage's outputs, after something was moved or the step was opened."""
    try:
        scene = scene_of(client, run_id, chosen, stage.step, kept, given)
    except QuantLabError as error:  # The file of slices is gone.
        return parts(stage, client, Shown(html=error_message(error, client.language)))
    return drawn(stage, scene)


def _connect(tab: Learn) -> None:
    for stage in tab.all_stages:
        _connect_stage(tab, stage)
        for event, number, programmatic in stage.openings:
            _connect_opening(tab, stage.lesson.name, event, number, programmatic)
    chosen = tab.nav.act(_choose, tab.where, [tab.where, *tab.columns.values()], **QUIET)
    tab.redraw(chosen)
    for event in tab.source.changed:
        tab.redraw(event)


def _connect_stage(tab: Learn, stage: Stage) -> None:
    state = tab.states[stage.lesson.name]
    inputs = [tab.shared.client, tab.shared.run_id, tab.source.chosen, state, *stage.controls]

    def move(
        client: Client, run_id: str, chosen: Mapping[str, str], kept: Any, *given: Any
    ) -> list[Any]:
        return moved(stage, client, run_id, chosen, kept, given)

    if stage.controls:
        # A text's `input` still carries what the field held before.
        events = [
            shown.change if control.kind == "text" else shown.input
            for control, shown in zip(stage.step.controls, stage.controls, strict=True)
        ]
        gr.on(events, move, inputs, stage.outputs, **MOVING)
    if stage.step.act is not None:
        outputs = [state, *stage.controls, *stage.outputs]
        stage.picture.act(_answering(stage), inputs, outputs, **QUIET)


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
