"""What a person does on a slow page: nothing is lost, and nothing older follows something newer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Request, Route, expect

from quantlab.store import Store
from tests.browser.app import App
from tests.browser.tab import PATIENCE, Tab


def test_a_tab_opened_before_the_page_arrived_speaks_the_language_too(tab: Tab) -> None:
    """The server learns the language with the page's first queued event, which is held back."""
    held: list[Route] = []
    released: list[bool] = []
    tab.page.context.add_cookies(
        [{"name": "quantlab_language", "value": "ja", "url": tab.app.url}],
    )
    tab.page.route(
        "**/queue/join*", lambda route: route.continue_() if released else held.append(route)
    )
    tab.page.goto(tab.app.url)
    tab.show("アドバイザー")
    expect(tab.find("#advisor-answer")).to_contain_text("Variants on this device")
    assert held
    for route in held:
        route.continue_()
    held.clear()
    released.append(True)
    expect(tab.find("#advisor-answer")).to_contain_text("この装置でのバリアント")


def crossed(tab: Tab, painted: str, first: Callable[[], None], second: Callable[[], None]) -> None:
    """`first` and `second` both have the component of this id painted; what `first` asks is
    answered after what `second` asks."""
    painters = tab.page.evaluate(
        """(name) => {
            const { components, dependencies } = window.gradio_config;
            const { id } = components.find((one) => one.props.elem_id === name);
            return dependencies.filter((one) => one.outputs.includes(id)).map((one) => one.id);
        }""",
        painted,
    )
    held: list[Route] = []

    def paints(request: Request) -> bool:
        return (
            "/gradio_api/run/" in request.url
            and json.loads(request.post_data or "{}").get("fn_index") in painters
        )

    def hold(route: Route) -> None:
        if held or not paints(route.request):
            route.fallback()
        else:
            held.append(route)

    tab.page.route("**/*", hold)
    first()
    for _ in range(PATIENCE // 50):
        if held:
            break
        tab.page.wait_for_timeout(50)
    assert held, "nothing was asked"
    with tab.page.expect_response(lambda answer: paints(answer.request)):
        second()
    tab.page.wait_for_timeout(500)  # It is on the page.
    with tab.page.expect_response(lambda answer: answer.request == held[0].request):
        held[0].continue_()
    tab.page.wait_for_timeout(1000)
    tab.page.unroute("**/*", hold)


def test_of_answers_that_cross_the_last_question_is_seen(tab: Tab) -> None:
    tab.open()
    tab.show("Learn")
    tab.find('#learn-nav [data-act="codebooks"]').click()
    onward = tab.find("#step-codebooks-codebook").get_by_role("button", name="Next")
    expect(onward).to_be_visible()
    tab.page.wait_for_timeout(1000)
    crossed(
        tab,
        "picture-codebooks-double",
        onward.click,
        lambda: tab.find("#codebooks-double-block-size").get_by_label("128").check(),
    )
    bits = tab.find('#picture-codebooks-double [data-fact="bits_plain"] dd')
    expect(bits).to_have_text(f"{4 + 32 / 128:.3f}")

    def grid_bits(value: int) -> None:
        field = tab.find("#inspect-grid-bits input[type=number]")
        field.fill(str(value))
        field.press("Enter")

    tab.show("Inspect")
    error = tab.find('#inspect-outlier-facts [data-fact="output_after"] dd')
    expect(error).to_be_visible()
    grid_bits(6)
    expect(error).to_have_text(re.compile(r"^[0-9.]+%$"))
    tab.page.wait_for_timeout(1000)
    at_six = error.inner_text()
    grid_bits(4)
    expect(error).not_to_have_text(at_six)
    tab.show("Compare")
    tab.page.wait_for_timeout(1000)
    crossed(tab, "inspect-outlier-facts", lambda: tab.show("Inspect"), lambda: grid_bits(6))
    expect(error).to_have_text(at_six)


def test_clicks_and_edits_in_quick_succession_all_count(tab: Tab, app: App, model: Path) -> None:
    tab.open()
    tab.small(model, seed=18)
    tab.only_variants("BF16", "RTN 4-bit", "GPTQ 4-bit")

    # A press whose button moves before the release, as when a message appears above it.
    tab.number("group-size", 0)
    expect(tab.find("#message-advanced [role=alert]")).to_be_visible()
    run = tab.find("#run")
    run.scroll_into_view_if_needed()
    box = run.bounding_box()
    assert box is not None
    tab.page.evaluate("window.clicks = 0; run.addEventListener('click', () => window.clicks++)")
    tab.page.mouse.move(box["x"] + 20, box["y"] + box["height"] / 2)
    tab.page.mouse.down()
    tab.page.evaluate("document.querySelector('#estimate').style.marginBottom = '200px'")
    tab.page.mouse.up()
    tab.page.wait_for_function("window.clicks === 1")
    tab.page.evaluate("document.querySelector('#estimate').style.marginBottom = ''")
    run.click()  # One that is not moved is one click, not two.
    tab.page.evaluate("new Promise((done) => setTimeout(done, 50))")
    assert tab.page.evaluate("window.clicks") == 2
    tab.number("group-size", 32)

    # Two options at once, then all chips at once.
    tab.section("options")
    expect(tab.find("#options-panel [data-option=refit]")).to_be_attached()
    tab.page.evaluate(
        """() => {
            for (const [name, value] of [["damp_percent", "0.25"], ["refit", false]]) {
                const control = document.querySelector(
                    `#options-panel [data-option=${name}]`);
                if (control.type === "checkbox") control.checked = value;
                else control.value = value;
                control.dispatchEvent(new Event("change", { bubbles: true }));
            }
        }"""
    )
    expect(tab.find(".ql-chip-changed")).to_have_count(1)
    run_id = tab.run()
    variant = Store(app.home).run_head(run_id).spec.variants[2]
    assert json.dumps(dict(variant.options), sort_keys=True) == (
        '{"damp_percent": 0.25, "refit": false}'
    )
    tab.find("#cancel").click()
    tab.page.evaluate("document.querySelectorAll('#chips [data-remove]').forEach((x) => x.click())")
    expect(tab.find(".ql-chip")).to_have_count(0)
