"""What the page's stylesheet says holds: Gradio resets margins, paddings and type by itself, with
selectors that win over a single class."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.app import App
from tests.browser.tab import Tab

pytestmark = pytest.mark.browser

LOST = """() => {
    const names = ["top", "right", "bottom", "left"];
    const boxes = ["margin", "padding"];
    const properties = boxes.flatMap((one) => names.map((side) => `${one}-${side}`));
    properties.push("font-size", "font-weight");
    const own = [], lost = new Set();
    const collect = (rules) => {
        for (const rule of rules) {
            if (rule.selectorText?.includes("ql-")) own.push(rule);
            if (rule.media && !matchMedia(rule.media.mediaText).matches) continue;
            if (rule.cssRules?.length) collect(rule.cssRules);
        }
    };
    for (const sheet of document.styleSheets) {
        try { collect(sheet.cssRules); } catch { continue; }  // Another origin's.
    }
    const met = (rule, element) => {
        try { return element.matches(rule.selectorText); } catch { return false; }
    };
    for (const rule of own) {
        for (const property of properties) {
            const said = rule.style.getPropertyValue(property);
            if (!/^(0|-?[\\d.]+px|\\d00)$/.test(said)) continue;
            if (rule.selectorText.includes(":hover")) continue;
            for (const element of document.querySelectorAll(rule.selectorText)) {
                const seen = getComputedStyle(element).getPropertyValue(property);
                if (parseFloat(seen) === parseFloat(said)) continue;
                // A shorthand with a variable in it does not tell its parts.
                const short = property.split("-")[0];
                const says = ({ style }) => style.getPropertyValue(property) || style[short];
                if (own.some((one) => one !== rule && says(one) && met(one, element))) continue;
                lost.add(`${rule.selectorText}: ${property} ${said}, but ${seen}`);
            }
        }
    }
    return [...lost];
}"""


def test_every_rule_of_the_stylesheet_holds(chromium: Browser, fresh: App) -> None:
    context = chromium.new_context(viewport={"width": 1440, "height": 1000}, locale="en-US")
    tab = Tab(context.new_page(), fresh).open()
    expect(tab.find("#results-table tbody").first).to_be_visible()
    lost = set(tab.page.evaluate(LOST))
    for name, ready in (
        ("Outputs", "#answers .ql-prompt"),
        ("Inspect", "#inspect-peaks [data-act]"),
        ("Learn", "#picture-formats-bits .ql-bits-value"),
        ("Advisor", "#advisor-results .ql-table"),
        ("Runs", "#runs-list"),
    ):
        tab.show(name)
        if name == "Outputs":
            tab.section("tokens-section")
            expect(tab.find(".ql-legend")).to_be_visible()
        expect(tab.find(ready).first).to_be_visible()
        lost |= set(tab.page.evaluate(LOST))
    assert lost == set()
    assert tab.problems == []
    context.close()
