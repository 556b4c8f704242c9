"""Judging outputs in a real Chromium: the paired tokens of a real run of a tiny model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from quantlab.results import ResultRecord
from quantlab.store import Store
from quantlab.types import Generation
from tests.browser.app import ROOT, App
from tests.browser.tab import Tab

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=\"document.title='gone'\"><script>document.title='gone'</script>"
LOOKS = {"light": (1440, "light"), "dark": (1440, "dark"), "narrow": (390, "light")}


@pytest.fixture(scope="module")
def finished(chromium: Browser, app: App, model: Path) -> str:
    """A finished comparison, made through the page once; its run id."""
    context = chromium.new_context(viewport={"width": 1440, "height": 1000}, locale="en-US")
    tab = Tab(context.new_page(), app).open()
    tab.small(model, seed=31)
    tab.only_variants("BF16", "RTN 4-bit")
    run_id = tab.run()
    tab.status("Finished")
    context.close()
    return run_id


def again(
    app: App, run_id: str, answers: dict[str, tuple[Generation, ...]] | None = None, **changes: Any
) -> str:
    """A finished run with the records of another, changed: its id."""
    store = Store(app.home)
    earlier = store.run(run_id)
    copy = store.create_run(earlier.spec)
    for record in earlier.records:
        outputs = (answers or {}).get(record.variant, record.outputs)
        store.add_record(copy, dataclasses.replace(record, outputs=outputs, **changes))
    store.update_run(copy, status="finished")
    return copy


def looks(chromium: Browser, app: App, query: str) -> Iterator[tuple[str, Tab]]:
    """The page of a run on wide and narrow, light and dark screens; nothing sticks out."""
    for name, (width, scheme) in LOOKS.items():
        context = chromium.new_context(
            viewport={"width": width, "height": 1000}, color_scheme=scheme, locale="en-US"
        )
        tab = Tab(context.new_page(), app).open(query)
        tab.show("Outputs")
        yield name, tab
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.problems == []
        context.close()


def keep(page: Page, name: str) -> None:
    """A screenshot for people, where one is asked for (`QUANTLAB_SCREENSHOTS=1`)."""
    if os.environ.get("QUANTLAB_SCREENSHOTS"):
        page.screenshot(path=ROOT / "screenshots" / f"{name}.png", full_page=True)


def records(app: App, run_id: str) -> dict[str, ResultRecord]:
    return {record.variant: record for record in Store(app.home).run(run_id).records}


def visible(text: str) -> str:
    return text.replace("\n", "⏎").replace(" ", "␣")


def test_tokens_show_both_top_fives(chromium: Browser, app: App, finished: str) -> None:
    reading = records(app, finished)["rtn:4"].reading
    assert sum(reading["kl"]) / len(reading["kl"]) == pytest.approx(
        records(app, finished)["rtn:4"].segments["kl"][0], rel=1e-12
    )
    changed = sum(
        a[0][0] != b[0][0] for a, b in zip(reading["original"], reading["variant"], strict=True)
    )
    for name, tab in looks(chromium, app, f"?run={finished}"):
        tab.section("tokens-section")
        column = tab.find('.ql-tokens .ql-column[data-reader="rtn:4"]')
        expect(column.locator(".ql-token")).to_have_count(len(reading["kl"]))
        expect(column.locator(".ql-token[data-flip]")).to_have_count(changed)
        box = tab.find(".ql-tops")
        expect(box).to_be_hidden()
        at = max(range(len(reading["kl"])), key=reading["kl"].__getitem__)
        column.locator(f'[data-at="{at}"]').click()
        expect(box).to_be_visible()
        for side in ("original", "variant"):
            rows = box.locator(f'[data-slot="{side}"] li')
            wanted = [
                f"{visible(reading['pieces'][str(token)])}{100 * chance:.1f}%"
                for token, chance in reading[side][at]
            ]
            expect(rows).to_have_text(wanted)
        shown = float(box.locator('[data-slot="kl"]').inner_text())
        assert shown == pytest.approx(reading["kl"][at], rel=5e-3)
        for token in tab.find(".ql-reading .ql-here").all():  # Marked where it stands in its line.
            assert token.evaluate("node => getComputedStyle(node).display") == "inline"
        keep(tab.page, f"outputs-tokens-{name}")
        # By keyboard, and with the pointer alone.
        tab.page.keyboard.press("ArrowLeft" if at else "ArrowRight")
        near = at - 1 if at else 1
        expect(column.locator(".ql-chosen")).to_have_attribute("data-at", str(near))
        column.locator('[data-at="20"]').hover()
        expect(box.locator('[data-slot="variant"] li').first).to_have_attribute(
            "data-token", str(reading["variant"][20][0][0])
        )


def test_the_blind_test_tells_names_after_the_vote(
    chromium: Browser, app: App, finished: str
) -> None:
    answers = {"bf16": "Water that runs to the sea.", "rtn:4": "Water, water, and water again."}
    given = {
        name: (Generation("What is a river?", text, (1,), (text,)),)
        for name, text in answers.items()
    }
    run_id = again(app, finished, given)
    votes: list[str | None] = []
    for name, tab in looks(chromium, app, f"?run={run_id}"):
        tab.section("blind-section")
        box = tab.find("#blind")
        box.get_by_role("button", name="Show a pair").click()
        expect(box.locator(".ql-answer")).to_have_count(2)
        expect(tab.find("#answers")).to_be_hidden()
        texts = box.locator(".ql-answer").all_text_contents()
        assert sorted(text.strip() for text in texts) == sorted(answers.values())
        assert not {"BF16", "RTN", "bf16", "rtn"} & set(box.inner_html().replace(":", " ").split())
        keep(tab.page, f"outputs-blind-asked-{name}")
        button = {"light": "A is better", "dark": "No difference", "narrow": "B is better"}[name]
        box.get_by_role("button", name=button).press("Enter")
        expect(box.locator('[role="status"]')).to_be_visible()
        expect(tab.find("#answers")).to_be_visible()
        names = box.locator(".ql-blind-name").all_inner_texts()
        by_name = {"BF16": "bf16", "RTN 4-bit": "rtn:4"}
        for shown, text in zip(names, texts, strict=True):
            assert answers[by_name[shown]] == text.strip()
        sides = {"light": names[0], "dark": "", "narrow": names[1]}
        votes.append(by_name.get(sides[name]))
        assert [vote.winner for vote in Store(app.home).votes(run_id)] == votes
        counts = [sum(v == one for v in votes) for one in ("bf16", "rtn:4", None)]
        cells = box.locator("tbody td")
        # Two wins to none: one half, as two coins fall alike half of the time. Else one.
        p = "0.500" if max(counts[:2]) == 2 else "1.000"
        expect(cells).to_have_text([*map(str, counts), p])
        keep(tab.page, f"outputs-blind-{name}")
        expect(box.get_by_role("button", name="Next pair")).to_be_visible()


def test_failures_are_named_under_the_table_and_the_outputs(
    chromium: Browser, app: App, finished: str
) -> None:
    """What is planted in the records of a run is told in both tabs, with the layer and advice."""
    run_id = again(app, finished, perplexity=7.0)
    store, rtn = Store(app.home), records(app, finished)["rtn:4"]
    hostile = Generation(rtn.outputs[0].prompt, HOSTILE * 20, (5,) * 20, (HOSTILE,) * 20)
    changed = dataclasses.replace(
        rtn,
        perplexity=7000.0,
        outputs=(hostile,),
        details={"static_inputs": {"layer": "blocks.3.down", "step": 24.0, "median": 0.1}},
        environment={"calibration": {"tokens": 64, "widest_input": 96, "widest_layer": "mlp.down"}},
    )
    store.add_record(run_id, changed)
    for name, tab in looks(chromium, app, f"?run={run_id}"):
        outputs = tab.find("#answers-autopsy")
        expect(outputs.locator("li")).to_have_count(4)
        for row, words in enumerate(
            (
                ["exploding perplexity", "7,000.00", "7.00"],
                ["blocks.3.down", "240 times", "SmoothQuant"],
                ["mlp.down", "64 calibration tokens", "96 channels"],
                ["repetition", "20 times"],
            )
        ):
            for word in ["RTN 4-bit", *words]:
                expect(outputs.locator("li").nth(row)).to_contain_text(word)
        outputs.locator(".ql-badge").first.hover()
        expect(tab.find("#ql-tip")).to_contain_text("at least twice the original's")
        keep(tab.page, f"outputs-autopsy-{name}")
        tab.show("Compare")
        expect(tab.find("#autopsy li")).to_have_count(4)
        assert tab.find(".ql-autopsy img").count() == 0
        assert tab.page.title() == "QuantLab"


def test_what_a_model_wrote_cannot_run(tab: Tab, app: App, finished: str) -> None:
    reading = dict(records(app, finished)["rtn:4"].reading)
    reading["text"] = [HOSTILE] * len(reading["text"])
    reading["pieces"] = dict.fromkeys(reading["pieces"], HOSTILE)
    answers = {
        variant: (Generation(HOSTILE, HOSTILE + variant, (1,), (HOSTILE,)),)
        for variant in records(app, finished)
    }
    run_id = again(app, finished, answers, reading=reading)
    tab.open(f"?run={run_id}")
    tab.show("Outputs")
    tab.section("tokens-section")
    tab.find('.ql-tokens [data-at="3"]').first.click()
    expect(tab.find(".ql-tops li code").first).to_have_text(visible(HOSTILE))
    tab.section("blind-section")
    tab.find("#blind [data-next]").click()
    expect(tab.find("#blind .ql-answer").first).to_contain_text(HOSTILE)
    tab.find("#blind [data-vote=tie]").click()
    expect(tab.find("#blind [role=status]")).to_be_visible()
    assert tab.page.title() == "QuantLab"
    assert tab.find("#tab-outputs img, .ql-tokens img, .ql-tops img, #blind img").count() == 0
