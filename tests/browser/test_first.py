"""What a person sees first in a real Chromium: the precomputed comparison, links, a phone's tabs;
and what is typed or was generated, which never runs."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import urllib.error
import urllib.request
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from quantlab import precomputed
from quantlab.plots.words import words
from quantlab.store import Store
from quantlab.types import Generation, RunSpec, VariantSpec
from quantlab.ui import advisor, inspection_api
from quantlab.ui.lessons import api
from tests.browser.app import ROOT, App
from tests.browser.tab import Tab
from tests.records import failed, record

pytestmark = pytest.mark.browser

EVERY = (*api.FUNCTIONS, *inspection_api.FUNCTIONS, advisor.advise)
FUNCTIONS = {function.__name__: function for function in EVERY}
METHODS = ("bf16", "rtn", "gptq")
HOSTILE = (
    "<img src=x onerror=window.__pwned=1><script>window.__pwned=1</script>"
    "<a href='javascript:window.__pwned=1'>x</a>\"><svg onload=window.__pwned=1>"
)


def opened(chromium: Browser, app: App, width: int, language: str = "en-US", **look: Any) -> Tab:
    context = chromium.new_context(
        viewport={"width": width, "height": 1000}, locale=language, reduced_motion="reduce", **look
    )
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    return Tab(context.new_page(), app)


def keep(tab: Tab, name: str) -> None:
    """A screenshot for people, where one is asked for (`QUANTLAB_SCREENSHOTS=1`)."""
    if os.environ.get("QUANTLAB_SCREENSHOTS"):
        tab.page.screenshot(path=ROOT / "screenshots" / f"{name}.png", full_page=True)


@pytest.mark.parametrize(("width", "look"), [(1440, "light"), (390, "dark")])
def test_the_page_is_full_at_first_sight(
    chromium: Browser, fresh: App, width: int, look: Any
) -> None:
    document = json.loads(precomputed.FILE.read_text(encoding="utf-8"))
    tab = opened(chromium, fresh, width, color_scheme=look).open()
    rows = tab.find("#results-table tbody")
    expect(rows).to_have_count(len(document["results"]))
    for result in document["results"]:
        row = tab.find(f'tbody[data-variant="{result["variant"]}"]')
        for key, field in (
            ("perplexity", "perplexity"),
            ("kl", "kl_divergence"),
            ("size", "size_bytes"),
            ("decode", "decode_tokens_per_second"),
        ):
            told = row.locator(f'td[data-key="{key}"]').get_attribute("data-value")
            assert float(told or "nan") == result[field]
        expect(row.locator(".ql-badge-precomputed")).to_have_count(1)
    where = document["environment"]
    for place in ("#progress", "#verdict"):
        expect(tab.find(place)).to_contain_text(where["date"][:10])
    expect(tab.find("#progress")).to_contain_text(where["cpu"])
    expect(tab.find("#header .ql-badge-precomputed")).to_be_visible()
    for name in ("perplexity-size", "kl-bits", "speed", "size"):
        expect(tab.find(f"#figure-{name}")).to_contain_text("precomputed")
    keep(tab, f"first-compare-{width}")
    tab.show("Outputs")
    expect(tab.find("#answers-intro .ql-badge-precomputed")).to_be_visible()
    prompts = document["run"]["spec"]["prompts"]
    expect(tab.find("#answers .ql-prompt")).to_have_text(prompts)
    expect(tab.find("#answers .ql-column")).to_have_count(len(prompts) * len(document["results"]))
    assert tab.find(".ql-tokens").count() == 0, "not drawn before it is opened"
    tab.section("tokens-section")
    expect(tab.find("#tokens [data-reader]")).to_have_count(len(document["results"]))
    tab.section("blind-section")
    tab.find("#blind [data-next]").click()
    expect(tab.find("#blind-message")).to_contain_text("run one first")
    tab.find("#ask-prompt textarea").fill("Why?")
    tab.find("#ask-button").click()
    expect(tab.find("#ask-message [role=alert]")).to_contain_text("start a run first")
    keep(tab, f"first-outputs-{width}")
    tab.show("Runs")
    expect(tab.find("#runs-list")).to_contain_text("No runs yet")
    expect(tab.find("[data-run-row=precomputed] .ql-badge-precomputed")).to_be_visible()
    expect(tab.find("#detail")).to_contain_text("--methods bf16,rtn:4,smoothquant:8,gptq:4")
    for button in ("#delete", "#export-json"):
        expect(tab.find(button)).to_be_hidden()
    keep(tab, f"first-runs-{width}")
    assert "run=" not in tab.page.url
    assert Store(fresh.home).runs(1) == []
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.problems == []
    tab.page.context.close()


@pytest.mark.parametrize("language", ["en-US", "ja-JP"])
def test_all_tabs_are_reached_on_a_phone_by_keyboard(
    chromium: Browser, fresh: App, language: str
) -> None:
    tab = opened(chromium, fresh, 390, language).open()
    say = words(language)
    names = [say(f"tab_{name}") for name in ("compare", "outputs", "learn", "advisor", "runs")]
    tabs = tab.find("#tabs").get_by_role("tab")
    shown = tabs.all_inner_texts()
    assert set(names) <= set(shown)
    expect(tab.find("#tabs .overflow-menu button").first).to_be_hidden()
    tab.page.keyboard.press("Tab")
    for name in shown:
        one = tab.page.get_by_role("tab", name=name, exact=True)
        box = one.bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        one.focus()
        tab.page.keyboard.press("Enter")
        expect(one).to_have_attribute("aria-selected", "true")
    assert tab.problems == []
    tab.page.context.close()


def asked(app: App, path: str, *values: Any) -> Any:
    """The JSON of a route; with values, the first output of a call."""
    data = json.dumps({"data": values}).encode() if values else None
    request = urllib.request.Request(
        app.url + "gradio_api/" + path, data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        told = json.load(answer)
    return told["data"][0] if values else told


def test_programs_may_call_what_is_stateless_and_nothing_else(fresh: App) -> None:
    offered = asked(fresh, "info")
    assert set(offered["named_endpoints"]) == {f"/{name}" for name in FUNCTIONS}
    assert offered["unnamed_endpoints"] == {}
    for name, function in FUNCTIONS.items():
        taken = inspect.signature(function).parameters
        told = offered["named_endpoints"][f"/{name}"]["parameters"]
        assert [one["parameter_name"] for one in told] == list(taken)
        for one in told:
            default = taken[one["parameter_name"]].default
            assert one["parameter_has_default"] is (default is not inspect.Parameter.empty)
    found = {one["format"]: one for one in asked(fresh, "run/number_formats", -1.5)}
    assert found["fp16"]["bits"] == "1" + "01111" + "1000000000"
    # 3 bits, absmax: the step is 3 / 3, and 0.4 becomes 0.
    rounded = asked(fresh, "run/rounding_error", [3.0, 0.4, -2.0], 3, 3, 1)
    assert rounded["rounded"] == [3.0, 0.0, -2.0]
    with pytest.raises(urllib.error.HTTPError) as refused:
        asked(fresh, "run/gguf_block", [1.0], "q4_k")
    assert "needs 256 numbers" in refused.value.read().decode()
    if importlib.util.find_spec("mcp") is None:
        return  # The page has started without it.
    tools = {one["name"]: one for one in asked(fresh, "mcp/schema")}
    assert set(tools) == set(FUNCTIONS)
    for name, function in FUNCTIONS.items():
        properties = tools[name]["inputSchema"]["properties"]
        assert set(properties) == set(inspect.signature(function).parameters)
        for one in properties.values():
            assert one.get("type") or one.get("enum")
            assert one["description"]
    arguments = {"name": "number_formats", "arguments": {"value": -1.5}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": arguments}
    request = urllib.request.Request(
        fresh.url + "gradio_api/mcp/",
        json.dumps(message).encode(),
        {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert "1011111000000000" in answer.read().decode()


def hostile_run(app: App) -> str:
    """A finished run whose every text is hostile: its id."""
    store = Store(app.home)
    spec = RunSpec(
        model=HOSTILE,
        text=HOSTILE,
        variants=tuple(VariantSpec(one, None if one == "bf16" else 4) for one in METHODS),
        prompts=(HOSTILE,),
    )
    run_id = store.create_run(spec)
    store.update_run(run_id, status="running", environment={"cpu": HOSTILE, HOSTILE: HOSTILE})
    answer = Generation(HOSTILE, HOSTILE, (1, 2), ("a", HOSTILE), 1)
    store.add_record(run_id, record("bf16", outputs=(Generation(HOSTILE, "a", (1,), ("a",)),)))
    store.add_record(
        run_id,
        record("rtn:4", outputs=(answer,), kernel=HOSTILE, config={HOSTILE: HOSTILE}),
    )
    store.add_record(run_id, failed("gptq:4", HOSTILE, HOSTILE))
    store.update_run(run_id, status="finished", error=HOSTILE)
    return run_id


def test_a_link_names_the_run_and_the_step_and_nothing_hostile_runs(
    chromium: Browser, fresh: App
) -> None:
    run_id = hostile_run(fresh)
    tab = opened(chromium, fresh, 1440)
    tab.open()
    # A run of one's own takes the place of the precomputed one.
    tab.page.wait_for_url(f"**/?*run={run_id}*")
    expect(tab.find("#results-table tbody")).to_have_count(3)
    assert tab.find("#results-table .ql-badge-precomputed").count() == 0
    expect(tab.find("#figure-size .main-svg").first).to_be_visible()
    tab.find("#header [data-share]").click()
    expect(tab.find("#header [data-share]")).to_have_text("Copied")
    assert tab.page.evaluate("navigator.clipboard.readText()") == tab.page.url
    tab.find("#results-table [data-details]").nth(1).click()
    for name in ("Outputs", "Runs"):
        tab.show(name)
        expect(tab.find("#tabs [role=tabpanel]:visible").last).to_contain_text("onerror")
    tab.find("[data-open='']").click()
    expect(tab.find("#results-table")).to_be_hidden()
    tab.page.wait_for_function("!location.search.includes('run=')")
    tab.find(f"[data-open='{run_id}']").click()
    tab.page.wait_for_url(f"**/?*run={run_id}*")
    tab.find("#use-settings").click()  # The hostile model and texts stand in the form.
    expect(tab.find("#model input")).to_have_value(HOSTILE)
    tab.press_run()
    expect(tab.find("#form [role=alert]").first).to_contain_text("onerror")
    tab.section("prompts-section")
    tab.find("#prompts textarea").fill(HOSTILE)
    tab.section("texts-section")
    for field in ("calibration", "evaluation"):
        tab.find(f"#{field} input").fill(HOSTILE)
        tab.find(f"#{field} input").press("Enter")
    tab.show("Outputs")
    tab.find("#ask-prompt textarea").fill(HOSTILE)
    tab.find("#ask-button").click()
    expect(tab.find("#ask-message .ql-message")).to_be_visible()
    tab.show("Advisor")
    for field in tab.find("#advisor-form input[role=listbox], #advisor-form input").all():
        if field.is_visible() and field.get_attribute("type") not in ("number", "radio"):
            field.fill(HOSTILE)
            field.press("Enter")
    tab.show("Learn")
    typed = tab.find("#step-formats-bits textarea, #step-formats-bits input[type=text]").first
    expect(tab.find("#figure-formats-bits, #picture-formats-bits").first).to_be_visible()
    typed.fill(HOSTILE)
    typed.blur()
    tab.section("learn-other")
    tab.type(tab.find("#learn-model textarea, #learn-model input").first, HOSTILE)
    tab.find("#learn-load").click()
    expect(tab.find("#learn-progress [role=alert]")).to_contain_text("onerror")
    tab.page.wait_for_url(f"**/?*run={run_id}*lesson=formats*")
    tab.find("#learn-nav [data-act=quiz]").click()
    tab.page.wait_for_url("**/?*lesson=quiz*")
    tab.find("#header [data-share]").click()
    link = tab.page.url
    assert tab.page.evaluate("navigator.clipboard.readText()") == link
    assert tab.page.evaluate("window.__pwned") is None
    # The link, with hostile words of its own, opens the run and the step.
    tab.page.goto(link + "&step=2&theme=" + HOSTILE)
    expect(tab.find("#text-quiz-measured h3, #lesson-quiz h3").first).to_be_visible()
    assert tab.run_id() == run_id
    tab.page.goto(f"{fresh.url}?run={HOSTILE}")
    expect(tab.find("#message-run .ql-message")).to_have_count(1)
    expect(tab.find("#message-run")).to_contain_text("no run <img")
    assert tab.page.evaluate("window.__pwned") is None
    assert tab.find("main img[src=x], main svg[onload], a[href^=javascript]").count() == 0
    assert tab.page.title() == "QuantLab"
    assert [one for one in tab.problems if not re.search("asked for .*/x$", one)] == []
    tab.page.context.close()
