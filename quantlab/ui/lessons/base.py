"""What a walkthrough is: steps with a text, controls, and a picture computed from all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import plotly.graph_objects as go

from quantlab.errors import QuantLabError
from quantlab.learn.material import Slice
from quantlab.learn.records import Measured
from quantlab.plots.templates import render
from quantlab.plots.words import Words
from quantlab.ui.client import Client
from quantlab.ui.messages import error_message


@dataclass(frozen=True)
class Control:
    """One thing to move. Its label is the text `learn_<name>`; choices are shown as they are, or
    as the text `learn_<name>_<choice>` where there is one. `last` stands for a maximum that is the
    slice's last row."""

    name: str
    kind: Literal["slider", "radio", "text", "check"]
    value: Any
    minimum: float = 0
    maximum: float = 1
    step: float = 1
    choices: tuple[Any, ...] = ()
    info: bool = False


@dataclass(frozen=True)
class Scene:
    """What a picture is drawn from. `state` belongs to the lesson and outlives its steps;
    `run` are the records of the run in view, if it has any."""

    client: Client
    slice: Slice
    values: Mapping[str, Any]
    state: Mapping[str, Any]
    run: Measured | None = None

    @property
    def say(self) -> Words:
        return self.client.say

    def html(self, template: str, **values: object) -> str:
        return render(template, self.client.language, **values)


@dataclass(frozen=True)
class Shown:
    """A drawn step: own markup, a figure, or both; `facts` are short numbers under the picture."""

    html: str = ""
    figure: go.Figure | None = None
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True)
class Fact:
    """A number with its name: `key` is the text `learn_fact_<key>`, explained on hover by
    `learn_tip_<key>`. `tone` sets off what is better or worse."""

    key: str
    value: str
    tone: Literal["", "good", "bad"] = ""


@dataclass(frozen=True)
class Step:
    """One step. `draw` computes the picture; `act` answers to a click or an edit in its markup with
    changes of the lesson's state and of this step's controls, by name."""

    name: str
    draw: Callable[[Scene], Shown]
    controls: tuple[Control, ...] = ()
    act: Callable[[Scene, str], dict[str, Any]] | None = None
    figure: bool = True


@dataclass(frozen=True)
class Lesson:
    name: str
    steps: tuple[Step, ...]
    start: Mapping[str, Any] = field(default_factory=dict)


def safely(step: Step, scene: Scene) -> Shown:
    """The step drawn, or what is wrong with what was typed, as a message."""
    try:
        return step.draw(scene)
    except QuantLabError as error:
        return Shown(html=error_message(error, scene.client.language))


def percent(value: float) -> str:
    """A share with three significant digits: `0.0123%`, `4.57%`, `83.4%`."""
    return f"{100 * value:.3g}%" if abs(value) < 9.995 else f"{100 * value:,.0f}%"


def short(value: float) -> str:
    """A number with four significant digits."""
    return f"{value:.4g}"
