"""The Advisor tab in a real Chromium; every number is computed again here, by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Browser, expect

from tests.browser.app import ROOT, App
from tests.browser.tab import Tab

pytestmark = pytest.mark.browser

SCREENSHOTS = ROOT / "screenshots"
BF16_7B = 2 * 6_738_415_616
"""Bytes of Llama-2-7B in 16 bits."""


def choose(tab: Tab, field: str, option: str) -> None:
    tab.find(f"#advisor-{field} input").click()
    tab.page.get_by_role("option", name=option, exact=True).click()


def value(tab: Tab, variant: str, key: str) -> float:
    cell = tab.find(f'#advisor-answer tr[data-advice="{variant}"] td[data-key="{key}"]')
    return float(cell.get_attribute("data-value") or "nan")


def choice(tab: Tab, variant: str) -> None:
    expect(tab.find("#advisor-answer .ql-advice")).to_have_attribute("data-choice", variant)


def awq(parameters_in_linears: int, rows_and_groups: int, rest: int) -> int:
    """4-bit codes, a float16 scale and a 4-bit zero-point a group of 64; the rest in 16 bits."""
    return parameters_in_linears // 2 + rows_and_groups * 2 + rows_and_groups // 2 + 2 * rest


def test_the_advisor_answers_for_models_devices_and_uses(tab: Tab) -> None:
    tab.open()
    tab.show("Advisor")
    # This machine and the bundled model: research keeps 16 bits, and no speed is known unasked.
    choice(tab, "bf16")
    assert value(tab, "bf16", "weights") == 2 * 134_515_008
    assert value(tab, "bf16", "cache") == 2 * 30 * 3 * 64 * 4096 * 2
    expect(tab.find("#advisor-answer")).to_contain_text("bandwidth not measured yet")
    expect(tab.find("#advisor-beside")).to_contain_text("5.47 → 5.69")

    choose(tab, "model", "Llama-2-7B")
    expect(tab.find("#advisor-answer [data-fact=shape]")).to_contain_text("32 layers, width 4,096")
    choose(tab, "device", "RTX 4090 24 GB")
    expect(tab.find("#advisor-answer")).to_contain_text("1,008.0 GB/s")
    choose(tab, "use", "Edge")
    choice(tab, "awq:4")
    cache = 2 * 32 * 32 * 128 * 4096 * 2
    assert value(tab, "bf16", "weights") == BF16_7B
    assert value(tab, "bf16", "cache") == cache == 2**31
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    rest = 6_738_415_616 - linears
    weights = awq(linears, linears // 64, rest)
    assert value(tab, "awq:4", "weights") == weights
    read = weights - 2 * 32_000 * 4096
    assert value(tab, "awq:4", "speed") == pytest.approx(1008e9 / (read + cache), rel=1e-9)
    overhead = 4 * (512 * (2 * 4096 + 96 * 128 + 2 * 11_008) + 32_000) + 240_000_000
    assert value(tab, "awq:4", "total") == weights + cache + overhead

    # A longer context and a batch: the cache grows, and 16 bits fit no longer.
    row = tab.find('#advisor-answer tr[data-advice="bf16"]')
    expect(row).to_have_attribute("data-fit", "fits")
    tab.number("advisor-context", 8192)
    tab.number("advisor-batch", 4)
    expect(row).to_have_attribute("data-fit", "no")
    assert value(tab, "bf16", "cache") == 8 * cache
    tab.number("advisor-batch", 0)
    alert = tab.find("#advisor-answer [role=alert]")
    expect(alert).to_have_text("Batch, sequences: needs a whole number of at least 1")
    tab.number("advisor-batch", 1)
    choice(tab, "awq:4")

    # A small board: GGUF, and then nothing at all.
    tab.number("advisor-context", 512)
    choose(tab, "device", "Raspberry Pi 5 8 GB")
    choice(tab, "gguf:q4_k_m")
    choose(tab, "model", "Llama-2-70B")
    expect(tab.find("#advisor-answer")).to_contain_text("Nothing that suits this use fits")

    # Numbers of one's own: by count, and by shape.
    choose(tab, "model", "my own: a parameter count")
    tab.number("advisor-parameters", 6.7)
    facts = tab.find("#advisor-answer [data-fact=shape]")
    expect(facts).to_contain_text(re.compile("A guess from the count: 32 layers.*6.74 B weights"))
    choose(tab, "model", "my own: layers, width, heads")
    expect(facts).to_contain_text("32 heads (8 key-value)")
    tab.number("advisor-kv-heads", 32)
    expect(facts).to_contain_text("32 heads (32 key-value)")
    expect(facts).to_contain_text("6.74 B weights")
    assert value(tab, "bf16", "weights") == BF16_7B
    tab.number("advisor-kv-heads", 3)
    expect(alert).to_contain_text("heads=32: needs a multiple of kv_heads=3")
    tab.number("advisor-kv-heads", 8)
    expect(facts).to_contain_text("32 heads (8 key-value)")

    # Without native kernels the bandwidth cannot be measured, and the page says why.
    tab.find("#advisor-measure").click()
    expect(tab.find("#advisor-message [role=alert]")).to_contain_text("switched off")

    # A term explains itself; the other language has every text.
    term = tab.find("#advisor-answer thead [data-tip]").nth(3)
    term.scroll_into_view_if_needed()  # Scrolling would hide the tip, in the frame after it.
    tab.page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")
    term.hover()
    expect(tab.find("#ql-tip")).to_be_visible()
    tab.find("#language input").click()
    tab.page.get_by_role("option", name="日本語").click()
    tab.show("アドバイザー")
    expect(tab.find("#advisor-answer")).to_contain_text("この装置でのバリアント")
    expect(tab.find("#advisor-beside")).to_contain_text("ハードウェアの対応")


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, True)])
def test_the_advisor_fits_wide_and_narrow_pages(
    chromium: Browser, app: App, width: int, dark: bool
) -> None:
    context = chromium.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if dark else "light",
        locale="en-US",
    )
    tab = Tab(context.new_page(), app).open()
    tab.show("Advisor")
    choose(tab, "device", "RTX 3060 12 GB")
    choose(tab, "model", "Llama-3-8B")
    choose(tab, "use", "Production")
    choice(tab, "smoothquant:8")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    SCREENSHOTS.mkdir(exist_ok=True)
    name = f"advisor-{width}-{'dark' if dark else 'light'}.png"
    tab.page.screenshot(path=Path(SCREENSHOTS / name), full_page=True)
    assert tab.problems == []
    context.close()


def test_programs_can_ask_as_well(app: App) -> None:
    client = Client(app.url, verbose=False)
    told = client.predict("Llama-2-7B", 0, 4096, 1, "rtx4090", "edge", api_name="/advise")
    assert told["choice"] == "awq:4"
    assert told["variants"][0]["kv_cache_bytes"] == 2**31
    info = client.view_api(return_format="dict")["named_endpoints"]["/advise"]
    assert [one["parameter_name"] for one in info["parameters"]][:2] == ["model", "parameters"]
    with pytest.raises(AppError, match=r"context=0: needs a whole number from 1"):
        client.predict("Llama-2-7B", 0, 0, 1, "rtx4090", "edge", api_name="/advise")
