"""One step of a walkthrough: its components, how they are laid out, and what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.plot import PlotData
from markupsafe import Markup

from quantlab.errors import QuantLabError
from quantlab.learn import material, records
from quantlab.plots import figures
from quantlab.plots.templates import render
from quantlab.plots.terms import paragraphs
from quantlab.ui.client import Client
from quantlab.ui.lessons.base import Control, Lesson, Scene, Shown, Step, safely
from quantlab.ui.messages import error_message
from quantlab.ui.services import services
from quantlab.ui.shared import html, i18n


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
    def name(self) -> str:
        """As elements of the page are called."""
        return f"{self.lesson.name}-{self.step.name.replace('_', '-')}"

    @property
    def outputs(self) -> list[Any]:
        return [one for one in (self.text, self.picture, self.figure) if one is not None]


def build_step(lesson: Lesson, step: Step, number: int) -> Stage:
    """Lay one step out: text and controls on the left, the picture on the right."""
    stage = Stage(lesson, step, number)
    name = stage.name
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
    return stage


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
