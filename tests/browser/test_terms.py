"""Explanations in a real Chromium: the page's own, those of controls, and those of figures,
on hover and on keyboard focus. That there is one for every term is a test without a browser."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Browser, Locator, expect

from quantlab.plots.words import words
from tests.browser.app import App
from tests.browser.tab import PATIENCE, Tab

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("terms")]


@pytest.mark.parametrize(("locale", "language"), [("en-US", "en"), ("ja-JP", "ja")])
def test_terms_explain_themselves(
    chromium: Browser, fresh: App, locale: str, language: str
) -> None:
    say = words(language)
    context = chromium.new_context(viewport={"width": 1440, "height": 1000}, locale=locale)
    tab = Tab(context.new_page(), fresh).open()
    tip = tab.find("#ql-tip")

    def told(reach: Callable[[], None], key: str) -> None:
        """Reached by hand until it is explained: while the page arrives it may move away."""
        for _ in range(PATIENCE // 250):
            tab.page.mouse.move(2, 2)
            reach()
            if tip.is_visible() and tip.inner_text() == say(key):
                return
            tab.page.wait_for_timeout(250)
        expect(tip).to_have_text(say(key))
        expect(tip).to_be_visible()

    def hovered(target: Locator, key: str) -> None:
        target.scroll_into_view_if_needed()
        told(lambda: target.hover(force=True), key)

    def focused(target: Locator, key: str) -> None:
        def reach() -> None:
            target.blur()
            target.focus()

        told(reach, key)
        expect(target).to_have_attribute("aria-describedby", "ql-tip")
        tab.page.keyboard.press("Escape")
        expect(tip).to_be_hidden()

    # Compare: a heading, a control, the title of an axis.
    hovered(tab.find('[data-sort="kl"]'), "term_kl")
    focused(tab.find('[data-sort="perplexity"]'), "term_perplexity")
    hovered(tab.find('#add-method [data-testid="block-info"]'), "tip_add_method")
    tab.section("texts-section")
    focused(tab.find("#eval-tokens input"), "tip_eval_tokens")
    hovered(tab.find("#figure-kl-bits .infolayer .ytitle"), "term_kl")
    # Outputs, and the facts of a run.
    tab.show(say("tab_outputs"))
    focused(tab.find("#answers .ql-column-facts span").first, "tip_answer_fact")
    tab.show(say("tab_runs"))
    hovered(tab.find("#facts dt .ql-term").first, "tip_setting_model")
    # Inspect: a linear of the map, an entry of a legend, a control.
    tab.show(say("tab_inspect"))
    hovered(tab.find("#inspect-figure-maxima .legendtoggle").first, "tip_inspect_activations")
    hovered(tab.find('#inspect-granularity [data-testid="block-info"]'), "tip_inspect_granularity")
    # Learn and Advisor.
    tab.show(say("tab_learn"))
    hovered(tab.find('#formats-bits-row [data-testid="block-info"]'), "tip_learn_row")
    tab.show(say("tab_advisor"))
    focused(tab.find("#advisor-context input"), "tip_advisor_context")
    assert tab.problems == []
    context.close()
