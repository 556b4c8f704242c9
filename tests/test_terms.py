"""Every term on every tab explains itself, on hover and on focus, in every language.

What counts as a term: the heading of a table's column (unless it is a variant's name or a number),
the name of a fact, a badge, an entry of a legend, a chip of the header; every labelled control; the
title of every axis and every entry of a legend in every figure.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import gradio as gr
import pytest
from gradio.components.base import FormComponent
from gradio.i18n import I18nData

from quantlab import advisor, labs, precomputed
from quantlab.jobs import JobView, VariantView
from quantlab.learn import material
from quantlab.plots import FIGURES, autopsy, figures, fragments, lab, pairs, tokens
from quantlab.plots.words import translations, words
from quantlab.results import ResultRecord
from quantlab.ui import (
    advisor_views,
    blind,
    inspection_painting,
    learn,
    learn_step,
    page,
    tips,
    variants,
    views,
)
from quantlab.ui.client import Client
from quantlab.ui.inspection_views import MEASURES
from quantlab.ui.lessons import LESSONS
from quantlab.ui.lessons.base import Scene
from quantlab.votes import Tally
from tests.pages import built
from tests.records import failed, record

LANGUAGES = sorted(translations())
SHIPPED = precomputed.run()


@dataclasses.dataclass
class Element:
    """A tag of a page, with what is in it."""

    tag: str
    attributes: dict[str, str]
    parent: Element | None
    inside: list[Element] = dataclasses.field(default_factory=list)
    text: str = ""

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def all(self) -> Iterator[Element]:
        yield self
        for one in self.inside:
            yield from one.all()

    @property
    def words(self) -> str:
        return " ".join(one.text for one in self.all()).strip()

    @property
    def explained(self) -> bool:
        """Whether it, something in it, or the button around it has an explanation that the keyboard
        reaches too."""
        around, up = [], self.parent
        while up is not None:
            around += [up] if up.tag == "button" else []
            up = up.parent
        for one in (*self.all(), *around):
            reached = one.tag in ("button", "a", "summary") or one.attributes.get("tabindex") == "0"
            if len(one.attributes.get("data-tip", "").strip()) > 2 and reached:
                return True
        return False


class Tree(HTMLParser):
    """The elements of the page's own markup."""

    VOID = ("input", "br", "img", "meta", "link", "hr")

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.root = self.at = Element("", {}, None)
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        one = Element(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.inside.append(one)
        if tag not in self.VOID:
            self.at = one

    def handle_endtag(self, tag: str) -> None:
        while self.at.parent is not None and self.at.tag != tag:
            self.at = self.at.parent
        self.at = self.at.parent or self.at

    def handle_data(self, data: str) -> None:
        self.at.text += data


def terms(markup: str) -> list[Element]:
    """The terms of a piece of markup, by the rule above."""
    found = []
    for one in Tree(markup).root.all():
        parent = one.parent
        around = parent.classes if parent else []
        if one.tag == "th" and one.attributes.get("scope") == "col":
            named = any("ql-dot" in inner.classes for inner in one.all())
            if not named and not re.fullmatch(r"\d*", one.words):
                found.append(one)
        elif one.tag == "dt" or "ql-badge" in one.classes:
            found.append(one)
        elif one.tag == "li" and ("ql-environment" in around or "ql-legend" in around):
            # The steps of a scale are numbers; the scale's name stands before them.
            if not re.match(r"[<≥]", one.words):
                found.append(one)
        elif one.tag == "span" and ("ql-column-facts" in around or "ql-bits-key" in around):
            found.append(one)
    return found


def failing() -> ResultRecord:
    """A record whose failure is named, and one with everything that details tell."""
    return failed("gptq:3", error="perplexity is not finite")


def everything() -> ResultRecord:
    details = {
        "peer": {"peer": "gptqmodel", "version": "1", "settings": "group 64"},
        "allocation": {
            "predicted_bits_per_weight": 4.0,
            "measured_bits_per_weight": 4.1,
            "predicted_kl_divergence": 0.1,
            "measured_kl_divergence": 0.2,
            "tokens": 512,
            "measured_at_bits": 4,
            "bits": {"0.q": 4, "1.q": 8},
        },
    }
    return record(
        "gptq:4", details=details, config={"bits": 4}, fallbacks=("a slower kernel",), artifact="ab"
    )


def compared(client: Client) -> dict[str, str]:
    """Compare, Outputs and Runs, of what ships and of a record with all there can be."""
    records = list(SHIPPED.records)
    view = JobView(
        SHIPPED,
        "finished",
        1.0,
        None,
        0,
        "",
        tuple(
            VariantView(r.variant, r.status, "", 0, 0, r, tuple(o.text for o in r.outputs))
            for r in records
        ),
        (),
    )
    language = client.language
    tally = [Tally("rtn:4", "gptq:4", 3, 1, 2)]
    return {
        "header": views.header(client, SHIPPED, SHIPPED.environment),
        "table": views.table(client, view),
        "details": fragments.results_table([everything(), failing()], language=language),
        "pairs": pairs.box(records, language),
        "autopsy": autopsy.box([record("rtn:2", perplexity=1e9), *records], language),
        "answers": views.answers(client, [view]),
        "tokens": tokens.view(records, language),
        "blind": blind.page(client, counted=tally),
        "runs": views.runs(client, [SHIPPED], ""),
        "detail": views.detail(client, SHIPPED),
        "facts": views.facts(client, SHIPPED),
        "shipped": views.shipped(client, SHIPPED),
        "chips": variants.chips_html(variants.defaults(), language),
    }


def inspected(client: Client) -> tuple[dict[str, str], list[Any]]:
    """The first two views of Inspect: markup and figures."""
    found: list[Any] = []
    chosen = {"file": "", "name": material.layers()[1]}
    found += inspection_painting.origin(client, chosen)
    for granularity in ("tensor", "group"):
        found += inspection_painting.outliers(client, chosen, 0.5, 4, False, granularity)
    for measure in MEASURES:
        found += inspection_painting.layers(client, chosen, measure, 4)
    markup = {f"inspect {at}": one for at, one in enumerate(found) if isinstance(one, str)}
    return markup, [one for one in found if hasattr(one, "plot")]


def taught(client: Client) -> tuple[dict[str, str], list[Any]]:
    """Every step of every walkthrough, at what its controls start with and at every choice."""
    markup: dict[str, str] = {"nav": learn.nav_html(client, learn.FIRST, 1)}
    plots = []
    for lesson in LESSONS.values():
        for step in lesson.steps:
            start = {control.name: control.value for control in step.controls}
            wishes = [start] + [
                {**start, control.name: choice}
                for control in step.controls
                if control.kind == "radio"
                for choice in control.choices
                if choice != control.value
            ]
            stage = learn_step.Stage(lesson, step, 1, figure=object() if step.figure else None)
            for at, values in enumerate(wishes):
                scene = Scene(client, material.load(), values, dict(lesson.start))
                text, picture, *plot = learn_step.drawn(stage, scene)
                markup[f"{lesson.name} {step.name} {at}"] = text + picture
                plots += [one for one in plot if one is not None]
    return markup, plots


def advised(client: Client) -> dict[str, str]:
    shape = advisor.SHAPES["bundled"]
    made = {}
    for name in ("rtx3060", "pi5", "phone"):
        advice = advisor.advise(shape, 4096, 64, advisor.device(name), "edge")
        made[name] = advisor_views.answer(client, advice, SHIPPED)
    return {**made, "beside": advisor_views.beside(client, SHIPPED)}


def laboratory(client: Client) -> tuple[dict[str, str], list[Any]]:
    """The third view of Inspect."""
    done = record("gptq:4")
    cells = [
        labs.Cell("gptq:4", "project", "project", "finished", done),
        labs.Cell("gptq:4", "self", "project", "failed", None, "too short"),
    ]
    drawn = lab.figure(cells, client.dark, client.language)
    return {"lab": lab.notes(cells, client.language)}, [figures.to_json(drawn)]


@pytest.fixture(scope="module", params=LANGUAGES)
def shown(request: pytest.FixtureRequest) -> tuple[str, dict[str, str], list[Any]]:
    """(language, markup by place, figures) of all six tabs."""
    client = Client(str(request.param))
    markup, plots = compared(client) | advised(client), []
    records = [*SHIPPED.records, record("efficientqat:2", curves={"block_ap": [[1.0, 0.5]]})]
    for draw in FIGURES.values():
        plots.append(figures.to_json(draw(records, False, client.language)))
    for tab in (inspected, taught, laboratory):
        more, drawn = tab(client)
        markup |= more
        plots += drawn
    return client.language, markup, plots


def test_every_term_of_the_pages_own_markup_is_explained(
    shown: tuple[str, dict[str, str], list[Any]],
) -> None:
    _, markup, _ = shown
    counted = 0
    for place, text in markup.items():
        for one in terms(text):
            counted += 1
            assert one.explained, f"{place}: <{one.tag}> {one.words}"
    assert counted > 300
    # The rule sees each kind, and on each tab.
    for place in ("header", "table", "details", "pairs", "answers", "tokens", "blind", "facts"):
        assert terms(markup[place]), place
    for place in ("beside", "pi5", "codebooks codebook 0", "formats bits 0", "lab"):
        assert terms(markup[place]), place


def named(plot: Any) -> tuple[set[str], set[str]]:
    """The titles of a figure's axes, and the entries of its legend."""
    drawn = json.loads(getattr(plot, "plot", plot))
    layout = drawn["layout"]
    titles = {
        axis["title"]["text"]
        for name, axis in layout.items()
        if re.fullmatch(r"[xy]axis\d*", name) and (axis.get("title") or {}).get("text")
    }
    entries = {
        trace["name"]
        for trace in drawn["data"]
        if layout.get("showlegend") and trace.get("showlegend") is not False and trace.get("name")
    }
    return titles, entries


def test_every_axis_and_legend_is_explained(
    shown: tuple[str, dict[str, str], list[Any]],
) -> None:
    """The page's script finds them by what is drawn, which must therefore be a known text."""
    language, _, plots = shown
    say = words(language)
    found: list[set[str]] = [set(), set()]
    for plot in plots:
        for kept, names in zip(found, named(plot), strict=True):
            kept |= names
    for names, known in zip(found, (tips.axes(), tips.legends()), strict=True):
        explained = {say(label): say(tip) for label, tip in known.items() if tip}
        names = {name.rpartition(", ")[2] if name not in explained else name for name in names}
        assert names <= explained.keys()
        assert all(len(explained[name]) > 5 for name in names)
    assert len(found[0]) > 30
    assert len(found[1]) > 10


@pytest.fixture(scope="module")
def demo() -> gr.Blocks:
    return built(page.build)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_control_is_explained(demo: gr.Blocks, language: str) -> None:
    """By Gradio's `info` beside it, or on hover of its label and when it has the focus."""
    labelled = [
        one
        for one in demo.blocks.values()
        if isinstance(one, FormComponent) and isinstance(one.label, I18nData)
    ]
    assert len(labelled) > 90
    say, found = words(language), tips.controls(demo)
    for one in labelled:
        assert one.elem_id, "its explanation is found by its id"
        text = one.info.key if one.info else found[one.elem_id]
        assert text is not None, f"{one.elem_id}: write tip_{one.label.key}"
        assert len(say(text)) > 5
    ids = [one.elem_id for one in labelled]
    assert len(set(ids)) == len(ids)
    shown = next(b for b in demo.blocks.values() if getattr(b, "elem_id", "") == "tips")
    holder = next(e for e in Tree(str(shown.value)).root.all() if "data-tips" in e.attributes)
    assert json.loads(holder.attributes["data-tips"]) == {
        "controls": found,
        "axes": tips.axes(),
        "legends": tips.legends(),
    }


def test_no_explanation_is_unused() -> None:
    folder = precomputed.FILE.parents[1]
    own = json.loads((folder / "assets/i18n/terms/en.json").read_text("utf-8"))
    sources = "\n".join(
        path.read_text("utf-8")
        for place, ending in (("quantlab", "*.py"), ("assets/templates", "*.html"))
        for path in sorted((folder / place).rglob(ending))
    )
    for key in own:
        label = key.removeprefix("tip_")
        made = any(f"tip_{label.split('_')[0]}_{brace}" in sources for brace in ("{", "' ~"))
        assert label in translations()["en"] or key in sources or made, key
