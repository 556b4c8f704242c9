"""The Learn tab without a browser: every step draws, in every language and theme; nothing typed
becomes markup; clicks change what they should."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gguf
import gradio as gr
import numpy as np
import pytest

from quantlab.learn import formats, material, matrix, quiz, records
from quantlab.plots.terms import paragraphs
from quantlab.plots.words import translations, words
from quantlab.ui import learn, learn_step
from quantlab.ui.client import Client
from quantlab.ui.lessons import LESSONS, api
from quantlab.ui.lessons.base import Lesson, Scene, Step
from quantlab.ui.shared import Shared
from tests.pages import built

HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
STEPS = [(lesson, step) for lesson in LESSONS.values() for step in lesson.steps]


def scene(step: Step, client: Client = Client(), layer: str = "", **changes: Any) -> Scene:  # noqa: B008
    values = {control.name: control.value for control in step.controls}
    state = changes.pop("state", {})
    return Scene(client, material.load(layer=layer), values | changes, state, None)


def stage(lesson: Lesson, step: Step) -> learn_step.Stage:
    return learn_step.Stage(lesson, step, 1, figure=object() if step.figure else None)


def step_of(lesson: str, name: str) -> tuple[Lesson, Step]:
    found = LESSONS[lesson]
    return found, next(step for step in found.steps if step.name == name)


@pytest.mark.parametrize(("lesson", "step"), STEPS, ids=lambda one: one.name)
@pytest.mark.parametrize("layer", material.layers())
def test_every_step_draws(lesson: Lesson, step: Step, layer: str) -> None:
    drawn = {}
    for language in translations():
        for dark in (False, True):
            client = Client(language, dark)
            text, picture, *plot = learn_step.drawn(stage(lesson, step), scene(step, client, layer))
            assert "ql-message-error" not in picture
            assert "[[" not in text
            drawn[language, dark] = text
            if step.figure:
                figure = json.loads(plot[0].plot)
                assert figure["data"]
                assert figure["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"
                assert figure["layout"]["title"]["text"]
            else:
                assert picture
    assert drawn["en", False] != drawn["ja", False]


@pytest.mark.parametrize(("lesson", "step"), STEPS, ids=lambda one: one.name)
def test_every_control_moves_its_picture(lesson: Lesson, step: Step) -> None:
    """A control that changes nothing has no business on the step."""
    before = learn_step.drawn(stage(lesson, step), scene(step))
    for control in step.controls:
        ends = {
            "slider": [control.minimum, control.maximum],
            "radio": [one for one in control.choices if one != control.value],
            "check": [not control.value],
            "text": ["1.5"],
        }[control.kind]
        after = [
            learn_step.drawn(stage(lesson, step), scene(step, **{control.name: end}))
            for end in ends
        ]
        shown = [[getattr(part, "plot", part) for part in made] for made in (before, *after)]
        assert any(made != shown[0] for made in shown[1:]), control.name


def test_texts_name_known_terms_and_are_complete() -> None:
    for language in translations():
        say = words(language)
        for lesson in LESSONS.values():
            for step in lesson.steps:
                key = f"learn_{lesson.name}_{step.name}"
                assert say(f"{key}_step")
                assert paragraphs(say(f"{key}_text"), say)
                for control in step.controls:
                    assert say(f"learn_{control.name}")
                    for choice in control.choices:
                        if isinstance(choice, str):
                            assert say(f"learn_{control.name}_{choice}")


def test_the_same_terms_are_explained_in_every_language() -> None:
    english, japanese = translations()["en"], translations()["ja"]
    for key, text in english.items():
        if key.startswith("learn_"):
            terms = [set(re.findall(r"\[\[(\w+)\|", one)) for one in (text, japanese[key])]
            assert terms[0] == terms[1], key


def test_no_text_of_the_lessons_is_unused() -> None:
    """Every text is reached from a step, a fact, a figure or a template."""
    texts = "\n".join(
        path.read_text("utf-8")
        for folder, ending in (("quantlab", "*.py"), ("assets/templates", "lesson*.html"))
        for path in sorted((material.BUNDLED.parents[2] / folder).rglob(ending))
    )
    names = {name for lesson, step in STEPS for name in (lesson.name, step.name)}
    own = json.loads((material.BUNDLED.parents[1] / "i18n/learn/en.json").read_text("utf-8"))
    for key in own:
        tail = key.removeprefix("learn_")
        parts = tail.split("_")
        prefixes = {"_".join(parts[:n]) for n in range(1, len(parts))}
        found = (
            key in texts
            or any(f'"{"_".join(parts[n:])}"' in texts for n in range(len(parts)))
            or prefixes & names
            or any(f"learn_{prefix}_" in texts for prefix in prefixes)
            or tail.startswith("term_")
        )
        assert found, key


@pytest.mark.parametrize("text", [HOSTILE, "abc", "1e999x"])
def test_what_is_typed_never_becomes_markup(text: str) -> None:
    lesson, step = step_of("formats", "bits")
    _, picture = learn_step.drawn(stage(lesson, step), scene(step, value=text))
    assert "needs a number" in picture
    assert "<script" not in picture
    assert "<img" not in picture


def answered(lesson: str, name: str, value: str, **changes: Any) -> list[Any]:
    found, step = step_of(lesson, name)
    act = learn._answering(stage(found, step))
    event = SimpleNamespace(_data={"value": value})
    state = changes.pop("state", {})
    given = [changes.get(control.name, control.value) for control in step.controls]
    return act(event, Client(), "", {"file": "", "layer": ""}, state, *given)


def test_a_flipped_bit_becomes_the_value() -> None:
    row = material.load().weight[0]
    pattern = formats.float_pattern("bf16", float(row[0]))
    state, value, _, _, _, picture = answered("formats", "bits", "flip:bf16:3")
    assert float(value) == formats.flipped(pattern, 3)
    assert f'data-value="{float(value)!r}"' in picture
    assert state == {}


@pytest.mark.parametrize(
    ("lesson", "step", "value"),
    [
        ("formats", "bits", "flip:bf16:99"),
        ("formats", "bits", f"flip:{HOSTILE}:1"),
        ("formats", "bits", "nonsense"),
        ("matrix", "absmax", f"x:0:0:{HOSTILE}"),
        ("matrix", "absmax", "z:0:0:1"),
        ("matrix", "absmax", "x:9:9:1"),
        ("matrix", "absmax", HOSTILE),
        ("superblock", "q4_k", "byte:-3"),
        ("superblock", "q4_0", HOSTILE),
    ],
)
def test_events_that_cannot_be_are_one_message(lesson: str, step: str, value: str) -> None:
    made = answered(lesson, step, value)
    picture = next(one for one in made if isinstance(one, str) and "ql-message-error" in one)
    assert picture.count('role="alert"') == 1
    assert "<script" not in picture
    assert "<img" not in picture


def test_an_edited_cell_stays_and_can_be_reset() -> None:
    state, _, _, picture = answered("matrix", "absmax", "x:1:2:-9.5")
    x, w = matrix.real_factors(material.load())
    assert state["x"][1][2] == -9.5
    assert state["w"] == w
    assert 'value="-9.5"' in picture
    state, *_ = answered("matrix", "outliers", "reset", state=state)
    lesson, step = step_of("matrix", "absmax")
    again = learn_step.drawn(stage(lesson, step), scene(step, state=state))[1]
    assert f'value="{x[1][2]!r}"' in again
    assert 'value="-9.5"' not in again


def test_a_moved_variant_stays_moved_and_is_scored() -> None:
    names = [record.variant for record in quiz.candidates(records.shipped()[0])]
    state, _, picture = answered("quiz", "predict", f"up:{names[2]}")
    assert state["order"] == [names[0], names[2], names[1], *names[3:]]
    shown = re.findall(r'data-variant="([^"]+)"', picture)
    assert shown == state["order"]
    lesson, step = step_of("quiz", "reveal")
    _, revealed, _ = learn_step.drawn(stage(lesson, step), scene(step, state=state))
    score = quiz.score(records.shipped()[0], state["order"])
    assert f"{score.right} / {score.pairs}" in revealed
    state, *_ = answered("quiz", "predict", f"up:{HOSTILE}")
    assert state["order"] == names


@pytest.fixture(scope="module")
def tab() -> learn.Learn:
    """The tab alone, in a page of its own."""

    def build() -> learn.Learn:
        with gr.Blocks():
            states = [gr.State(one) for one in (Client(), "", {}, "", False)]
            return learn.build(Shared(*states))

    return built(build)


def test_a_tick_paints_nothing_but_another_models_slices(tab: learn.Learn) -> None:
    """Of a tick's many answers a late one would paint the old model over the new one."""
    page = tab.nav
    while page.parent is not None:
        page = page.parent
    events = list(page.fns.values())
    chosen = tab.source.chosen
    ticks = {one._id for one in events if any(name == "tick" for _, name in one.targets)}
    painters = [one for one in events if tab.nav in one.outputs]
    assert ticks
    assert not ticks & {one.trigger_after for one in painters}
    (follower,) = [one for one in painters if (chosen._id, "change") in one.targets]
    assert follower.trigger_mode == "always_last"
    # The browser notices the change of a State only where a queued event brings it.
    bringing = [one for one in events if chosen in one.outputs]
    unpainted = [one for one in bringing if one._id not in {p.trigger_after for p in painters}]
    assert {one.queue for one in unpainted if one.fn.__name__ != "_start"} == {True}


def test_a_layer_that_is_too_narrow_is_said() -> None:
    narrow = material.random()
    for name in ("q4_0", "q4_k", "beside"):
        lesson, step = step_of("superblock", name)
        values = {control.name: control.value for control in step.controls}
        _, picture, plot = learn_step.drawn(
            stage(lesson, step), Scene(Client(), narrow, values, {})
        )
        assert "choose a wider linear" in picture
        assert plot is None


@pytest.mark.parametrize(("lesson", "step"), STEPS, ids=lambda one: one.name)
def test_steps_take_any_models_slices(lesson: Lesson, step: Step) -> None:
    """Few rows, few channels: every picture but that of super-blocks can be drawn."""
    values = {control.name: control.value for control in step.controls}
    small = material.random(rows=8, columns=64, tokens=32)
    _, picture, *_ = learn_step.drawn(stage(lesson, step), Scene(Client(), small, values, {}))
    assert ("ql-message-error" in picture) == (lesson.name == "superblock")


def test_a_link_names_a_lesson_and_a_step() -> None:
    client = Client.of({"lesson": "columns", "step": 2, "language": "ja"})
    assert (client.lesson, client.step) == ("columns", 2)
    for odd in ("2", None, -1, 1e9, float("nan"), [], True):
        assert Client.of({"step": odd}).step == 1


def test_programs_get_the_same_numbers() -> None:
    found = {one["format"]: one for one in api.number_formats(-1.5)}
    assert found["fp16"] == {
        "format": "fp16",
        "bits": "1011111000000000",
        "fields": [1, 5, 10],
        "value": "-1.5",
    }
    product = api.quantized_product([[1.0, -2.0], [0.5, 4.0]], [[2.0, 1.0]], "absmax", 3)
    assert product["exact"] == ((0.0,), (5.0,))
    rounded = api.rounding_error([0.1, -0.2, 0.3, 3.0], 4, 2)
    assert rounded["steps"] == pytest.approx([0.2 / 7, 0.2 / 7, 3 / 7, 3 / 7])
    row = material.load().weight[0].tolist()
    block = api.gguf_block(row, "q4_0")
    kind = gguf.GGMLQuantizationType.Q4_0
    assert block["bytes"] == gguf.quantize(np.array([row[:32]], np.float32), kind).tobytes().hex()


@pytest.mark.parametrize(
    "call",
    [
        lambda: api.quantized_product([[1.0, 2.0]], [[1.0]]),
        lambda: api.quantized_product([[float("nan")]], [[1.0]]),
        lambda: api.quantized_product([[1.0]], [[1.0]], HOSTILE),
        lambda: api.quantized_product([[1.0]], [[1.0]], bits=99),
        lambda: api.rounding_error([], 4),
        lambda: api.rounding_error([1.0], 4, 0),
        lambda: api.gguf_block([1.0], "q4_k"),
        lambda: api.gguf_block([1.0] * 256, "q9"),
        lambda: api.gguf_block([1.0] * 100_000),
    ],
)
def test_programs_that_ask_wrongly_get_one_message(call: Callable[[], Any]) -> None:
    with pytest.raises(gr.Error, match=r"^\W*(x, w|x|scheme|bits|weights|group_size|type)"):
        call()
