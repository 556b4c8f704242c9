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
from tests.browser.conftest import ROOT, App, Tab

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


def again(app: App, run_id: str, **changes: Any) -> str:
    """A finished run with the records of another, changed: its id."""
    store = Store(app.home)
    earlier = store.run(run_id)
    copy = store.create_run(earlier.spec)
    for record in earlier.records:
        store.add_record(copy, dataclasses.replace(record, **changes))
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
        column = tab.find('.ql-tokens .ql-column[data-variant="rtn:4"]')
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
        keep(tab.page, f"outputs-tokens-{name}")
        # By keyboard, and with the pointer alone.
        tab.page.keyboard.press("ArrowLeft" if at else "ArrowRight")
        near = at - 1 if at else 1
        expect(column.locator(".ql-chosen")).to_have_attribute("data-at", str(near))
        column.locator('[data-at="20"]').hover()
        expect(box.locator('[data-slot="variant"] li').first).to_have_attribute(
            "data-token", str(reading["variant"][20][0][0])
        )


def test_what_a_model_wrote_cannot_run(tab: Tab, app: App, finished: str) -> None:
    reading = dict(records(app, finished)["rtn:4"].reading)
    reading["text"] = [HOSTILE] * len(reading["text"])
    reading["pieces"] = dict.fromkeys(reading["pieces"], HOSTILE)
    answer = Generation(HOSTILE, HOSTILE, (1,), (HOSTILE,))
    run_id = again(app, finished, reading=reading, outputs=(answer,))
    tab.open(f"?run={run_id}")
    tab.show("Outputs")
    tab.section("tokens-section")
    tab.find('.ql-tokens [data-at="3"]').first.click()
    expect(tab.find(".ql-tops li code").first).to_have_text(visible(HOSTILE))
    assert tab.page.title() == "QuantLab"
    assert tab.find("#tab-outputs img, .ql-tokens img, .ql-tops img").count() == 0
