"""The whole page: header, tabs, and the timer that keeps every piece up to date."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from quantlab.plots.words import NAMES
from quantlab.ui import (
    actions,
    advisor,
    compare,
    form,
    inspection,
    learn,
    options,
    outputs,
    runs,
    tips,
    variants,
)
from quantlab.ui.client import Client
from quantlab.ui.messages import message
from quantlab.ui.order import LOOK, keep
from quantlab.ui.painter import SLOW, paint
from quantlab.ui.services import services
from quantlab.ui.shared import BUSY, QUIET, WANTED, Shared, html, i18n

ARRIVE = "(told, saved) => [JSON.stringify(window.quantlab.client()), saved]"


def build() -> gr.Blocks:
    """The page, ready for `server.launch`. Nothing is started or computed."""
    with gr.Blocks(title="QuantLab", fill_width=True, analytics_enabled=False) as demo:
        shared = Shared(
            client=gr.State(Client()),
            run_id=gr.State(""),
            painted=gr.State({}),
            fork=gr.State(""),
            opened=gr.State(False),
        )
        pieces: dict[str, Any] = {"timer": gr.Timer(SLOW)}
        told = gr.Textbox(visible="hidden", elem_id="client", container=False)
        probe = html("probe", "quantlab.watchClient(trigger)", events=("client", "linked", "look"))
        with gr.Row(elem_id="frame", equal_height=False):
            pieces["header"] = html("header", "quantlab.followRun(element, watch)", scale=1)
            language = gr.Dropdown(
                [(name, code) for code, name in NAMES.items()],
                value="en",
                label=i18n("language"),
                elem_id="language",
                filterable=False,
                scale=0,
                min_width=130,
            )
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab(i18n("tab_compare"), id="compare", elem_id="tab-compare"):
                compare_tab = compare.build(shared)
            with gr.Tab(i18n("tab_outputs"), id="outputs", elem_id="tab-outputs"):
                outputs_tab = outputs.build(shared)
            with gr.Tab(i18n("tab_inspect"), id="inspect", elem_id="tab-inspect") as inspect_page:
                inspect_tab = inspection.build(shared)
            with gr.Tab(i18n("tab_learn"), id="learn", elem_id="tab-learn") as learn_page:
                learn_tab = learn.build(shared)
            with gr.Tab(i18n("tab_advisor"), id="advisor", elem_id="tab-advisor") as advisor_page:
                advisor_tab = advisor.build(shared)
            with gr.Tab(i18n("tab_runs"), id="runs", elem_id="tab-runs") as runs_page:
                runs_tab = runs.build(shared)

        pieces |= compare_tab.pieces | outputs_tab.pieces | inspect_tab.pieces | runs_tab.pieces
        pieces |= {f"figure_{name}": plot for name, plot in compare_tab.figures.items()}
        notice = compare_tab.messages["run"]
        chosen = [compare_tab.chips, compare_tab.options]
        inputs = [compare_tab.inputs[name] for name in form.FIELDS]

        def tick(
            client: Client,
            run_id: str,
            painted: dict[str, str],
            fork: str,
            opened: bool,
            pressed: actions.Pressed,
        ) -> dict[Any, Any]:
            wanted = {WANTED: "yes"} if opened else {}
            painting = paint(client, run_id, painted | wanted, fork)
            changed = {pieces[name]: value for name, value in painting.changed.items()}
            if pressed.outdated():
                changed[notice] = ""
            return changed | {shared.painted: painting.marks}

        def arrive(told: str, saved: object) -> dict[Any, Any]:
            client, values, note = _arrive(told, saved)
            run_id = services().first_in_view(client.run)
            painting = paint(client, run_id, {}, first=True)
            return {
                shared.client: client,
                shared.run_id: run_id,
                shared.painted: painting.marks,
                language: client.language,
                notice: note,
                compare_tab.chips: variants.chips_html(values["variants"], client.language),
                compare_tab.options: options.options_html(values["variants"], client),
                **{compare_tab.inputs[name]: values[name] for name in form.FIELDS},
                **{pieces[name]: value for name, value in painting.changed.items()},
            }

        watched = [shared.client, shared.run_id, shared.painted, shared.fork, shared.opened]
        shown = [*pieces.values(), shared.painted]
        arrived = demo.load(
            arrive,
            [told, compare_tab.saved],
            [shared.client, shared.run_id, language, notice, *chosen, *inputs, *shown],
            js=ARRIVE,
            **BUSY,
        )
        told_anew = probe.client(
            _told_anew,
            compare_tab.inputs["variants"],
            [shared.client, language, *chosen],
            **BUSY,
        )
        opened = runs_page.select(lambda: services().history(fresh=True) and None, **QUIET)
        used = runs_tab.use.click(
            _use,
            [shared.client, shared.run_id],
            [tabs, runs_tab.notice, compare_tab.options, *inputs],
            **BUSY,
        )
        language.input(None, language, None, js="(code) => window.quantlab.setLanguage(code)")
        probe.look(tick, [*watched, compare_tab.pressed], [*shown, notice], **QUIET)
        pieces["timer"].tick(None, None, None, js="() => window.quantlab.tick()", **QUIET)
        learn_tab.arrive(probe.linked, tabs)
        for event in [told_anew, learn_page.select(lambda: None, **QUIET)]:
            learn_tab.redraw(event)
        for event in [told_anew, inspect_page.select(lambda: None, **QUIET)]:
            inspect_tab.redraw(event)
        inspection.connect_compare(inspect_tab, tabs, compare_tab.inputs, compare_tab.options)
        for listen in (advisor_page.select, told_anew.then):
            advisor_tab.answer(listen)
        arrived.then(None, None, None, js="() => window.quantlab.arrived()", **QUIET)
        for event in [told_anew, opened, used, *shared.repaint]:
            event.then(None, None, None, **LOOK)
        tips.build(demo)
        keep(demo)
    return demo


def _arrive(told: str, saved: object) -> tuple[Client, dict[str, Any], str]:
    """A browser tab has opened or reloaded the page: who it is, its form as it was, and a message
    where its address names a run that there is not."""
    client = Client.of(json.loads(told or "{}"))
    lost = client.run and not services().known(client.run)
    note = client.say("run_missing", id=client.run) if lost else ""
    return client, form.restored(saved), message(note, client.language) if note else ""


def _told_anew(data: list[dict[str, Any]], event: gr.EventData) -> tuple[Client, str, str, str]:
    """The theme or the language of the browser tab has changed."""
    client = Client.of(event._data)
    chips = variants.chips_html(data, client.language)
    return client, client.language, chips, options.options_html(data, client)


def _use(client: Client, run_id: str) -> list[Any]:
    """Put the settings of the run in view into the form, and show the form."""
    values, note = runs.settings(client, run_id)
    if values is None:
        return [gr.skip(), note, gr.skip(), *(gr.skip() for _ in form.FIELDS)]
    shown = options.options_html(values["variants"], client)
    return [gr.Tabs(selected="compare"), note, shown, *(values[name] for name in form.FIELDS)]
