"""The Inspect tab in a real Chromium: every view is driven by hand, and what it shows is recomputed
here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Locator, expect
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantlab import pipeline
from quantlab.learn import material
from quantlab.plots import numbers
from quantlab.store import Store
from quantlab.texts import ASSETS
from quantlab.types import RunSpec, VariantSpec
from tests.browser.app import ROOT, App
from tests.browser.tab import PATIENCE, Kept, Tab

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("inspect")]

SHOTS = ROOT / "screenshots" / "inspect"
SHIPPED = ROOT / "assets" / "inspect"
NAME = "11.mlp.down_proj"


class Page(Tab):
    """The tab with its gestures."""

    def cell(self, view: str, name: str) -> Locator:
        return self.find(f'#inspect-{view} [data-act="{name}"]')

    def fact(self, view: str, key: str) -> Locator:
        return self.find(f'#inspect-{view}-facts [data-fact="{key}"] dd')

    def slide(self, control: str, value: float) -> None:
        field = self.find(f"#inspect-{control} input[type=number]")
        field.fill(f"{value:g}")
        field.press("Enter")

    def choose(self, control: str, label: str) -> None:
        self.find(f"#inspect-{control}").get_by_label(label, exact=True).check()

    def drop(self, control: str, label: str) -> None:
        self.find(f"#inspect-{control} input").click()
        self.page.get_by_role("option", name=label, exact=True).click()

    def figure(self, name: str) -> None:
        expect(self.find(f"#inspect-figure-{name} .main-svg").first).to_be_visible()

    def fill(self, control: str, text: str) -> None:
        self.find(f"#inspect-{control} textarea, #inspect-{control} input").first.fill(text)


@pytest.fixture(scope="module")
def kept(chromium: Browser, app: App) -> Iterator[Kept[Page]]:
    kept = Kept(chromium, app, Page, "Inspect")
    yield kept
    kept.close()


@pytest.fixture
def page(kept: Kept[Page], request: pytest.FixtureRequest) -> Iterator[Page]:
    """One browser tab for all views."""
    yield from kept.lend(request)


def number(text: str) -> float:
    value = float(re.sub(r"[%×,]", "", text))
    return value / 100 if text.endswith("%") else value


def shows(fact: Locator, value: float, rel: float = 6e-3) -> None:
    """Wait until the fact shows this value."""
    for _ in range(PATIENCE // 100):
        text = fact.text_content() or "" if fact.count() else ""
        if re.fullmatch(r"[-\d.,e+]+[%×]?", text) and number(text) == pytest.approx(value, rel=rel):
            return
        fact.page.wait_for_timeout(100)
    raise AssertionError(f"{fact.text_content()} is not {value}")


class Raw:
    """The file that ships, read without QuantLab."""

    def __init__(self) -> None:
        with safe_open(SHIPPED / "bundled.safetensors", framework="np") as file:
            about: dict[str, Any] = {k: json.loads(v) for k, v in file.metadata().items()}
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.linears = [row[0] for row in about["linears"]]
        self.inputs = {row[0]: row[3] for row in about["linears"]}
        self.about = about["inputs"]

    def maxima(self, kind: str, name: str) -> np.ndarray:
        place = self.inputs[name]
        first = sum(one["columns"] for one in self.about[:place])
        codes = self.tensors[kind][first : first + self.about[place]["columns"]]
        low, high = self.about[place][kind]
        found: np.ndarray = np.exp(low + codes.astype(float) * (high - low) / 255)
        return found

    def output_error(self, name: str, bits: int) -> float:
        place = [2, 3, 4, 5, 6, 8].index(bits)
        return float(self.tensors["errors"][self.linears.index(name)][1][place])


def scale(raw: Raw, alpha: float) -> np.ndarray:
    """SmoothQuant's equation 4 for the whole input of NAME, whose fold goes channel by channel."""
    peaks, weights = raw.maxima("peaks", NAME), raw.maxima("weights", NAME)
    found: np.ndarray = peaks**alpha / weights ** (1 - alpha)
    return found


def rounded(values: np.ndarray, bits: int, symmetric: bool, size: int) -> np.ndarray:
    """Plain rounding, one grid for `size` neighbours of the flattened rows."""
    parts = values.reshape(-1, size)
    if symmetric:
        step = np.abs(parts).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
        return (np.round(parts / step) * step).reshape(values.shape)
    low, high = np.minimum(parts.min(1), 0), np.maximum(parts.max(1), 0)
    step = ((high - low) / (2**bits - 1))[:, None]
    zero = np.round(-low[:, None] / step)
    codes = np.clip(np.round(parts / step) + zero, 0, 2**bits - 1)
    return ((codes - zero) * step).reshape(values.shape)


def output_error(alpha: float | None, bits: int, symmetric: bool, whole: bool, raw: Raw) -> float:
    """Of the slice that ships, both factors on grids of the tensor or of a row."""
    one = material.load(layer=NAME)
    x, w = one.inputs.double().numpy(), one.weight.double().numpy()
    wanted = x @ w.T
    if alpha is not None:
        s = scale(raw, alpha)[one.first : one.first + x.shape[1]]
        x, w = x / s, w * s
    x, w = (rounded(v, bits, symmetric, v.size if whole else v.shape[1]) for v in (x, w))
    return float(np.square(x @ w.T - wanted).sum() / np.square(wanted).sum())


def test_outliers(page: Page) -> None:
    raw = Raw()
    origin = page.find("#inspect-origin .ql-lesson-origin")
    expect(origin).to_contain_text("SmolLM2")
    expect(origin).to_contain_text("210 linears in 30 blocks")
    origin.locator(".ql-badge-precomputed").focus()
    expect(page.find("#ql-tip")).to_contain_text(material.origin().machine)
    expect(page.find("#inspect-peaks [data-act]")).to_have_count(210)
    expect(page.cell("peaks", NAME)).to_have_attribute("aria-pressed", "true")
    peaks = raw.maxima("peaks", NAME)
    shows(page.fact("outlier", "peak"), float(peaks.max()))
    shows(page.fact("outlier", "top"), float(peaks.argmax()), rel=0)
    shows(page.fact("outlier", "spread"), float(peaks.max() / np.sort(peaks)[767]), rel=0.01)
    for figure in ("maxima", "inputs", "weights"):
        page.figure(figure)
    shows(page.fact("outlier", "output_before"), output_error(None, 4, False, True, raw), 0.02)
    shows(page.fact("outlier", "output_after"), output_error(0.5, 4, False, True, raw), 0.02)
    page.slide("alpha", 0.8)
    smooth = peaks / scale(raw, 0.8)
    shows(page.fact("outlier", "spread_after"), float(smooth.max() / np.sort(smooth)[767]), 0.01)
    shows(page.fact("outlier", "output_after"), output_error(0.8, 4, False, True, raw), 0.02)
    page.choose("symmetric", "symmetric (absmax)")
    page.choose("granularity", "a row")
    page.slide("grid-bits", 6)
    shows(page.fact("outlier", "output_after"), output_error(0.8, 6, True, False, raw), 0.02)
    shows(page.fact("outlier", "output_before"), output_error(None, 6, True, False, raw), 0.02)
    # The keyboard: one stop for the whole map, arrows within it.
    assert page.find('#inspect-peaks [tabindex="0"][data-act]').count() == 1
    page.cell("peaks", NAME).focus()
    page.page.keyboard.press("ArrowRight")
    expect(page.cell("peaks", "12.mlp.down_proj")).to_be_focused()
    page.page.keyboard.press("Enter")
    expect(page.cell("peaks", "12.mlp.down_proj")).to_have_attribute("aria-pressed", "true")
    expect(page.find("#inspect-block input")).to_have_value("12")
    expect(page.find("#inspect-note")).to_contain_text("do not ship")
    expect(page.find('#inspect-note [data-act="read"]')).to_be_visible()
    shows(page.fact("outlier", "peak"), float(raw.maxima("peaks", "12.mlp.down_proj").max()))
    page.figure("maxima")
    page.drop("block", "10")
    page.drop("linear", "self_attn.q_proj")
    expect(page.cell("peaks", "10.self_attn.q_proj")).to_have_attribute("aria-pressed", "true")
    expect(page.find("#inspect-note")).to_contain_text("Real values")
    shows(page.fact("outlier", "peak"), float(raw.maxima("peaks", "10.self_attn.q_proj").max()))


def test_layers(page: Page) -> None:
    page.show("Layer by linear")
    kl = json.loads((SHIPPED / "kl-4.json").read_text("utf-8"))
    expect(page.find("#inspect-map [data-act]")).to_have_count(210)
    for name in (NAME, "29.mlp.up_proj", "0.self_attn.q_proj"):
        value = numbers.divergence(kl["cells"][name][0])
        expect(page.cell("map", name)).to_have_attribute("data-value", value)
    expect(page.find("#inspect-map")).to_contain_text(numbers.divergence(kl["floor"]))
    badge = page.find("#inspect-map .ql-badge-precomputed")
    badge.focus()
    expect(page.find("#ql-tip")).to_contain_text(kl["date"][:10])
    page.cell("map", "29.mlp.up_proj").click()
    expect(page.fact("layer", "shape")).to_have_text("1,536 × 576")
    value, low, high = (numbers.divergence(v) for v in kl["cells"]["29.mlp.up_proj"])
    expect(page.fact("layer", "kl")).to_have_text(f"{value} ({low} – {high})")
    for figure in ("weight", "worst"):
        page.figure(figure)
    raw = Raw()
    page.choose("colour", "output error")
    page.choose("bits", "3")
    shows(page.fact("layer", "output_error"), raw.output_error("29.mlp.up_proj", 3))
    shown = page.cell("map", NAME).get_attribute("data-value") or ""
    assert number(shown) == pytest.approx(raw.output_error(NAME, 3), rel=6e-3)
    page.choose("colour", "KL divergence")
    expect(page.find("#inspect-map")).to_contain_text("Nothing was measured at these bits yet")
    expect(page.cell("map", NAME)).to_have_attribute("data-value", "")
    page.choose("bits", "4")
    expect(page.cell("map", NAME)).not_to_have_attribute("data-value", "")


def test_more_bits_go_to_the_form(page: Page) -> None:
    page.show("Layer by linear")
    page.cell("map", "29.mlp.up_proj").click()
    expect(page.cell("map", "29.mlp.up_proj")).to_have_attribute("aria-pressed", "true")
    page.find("#inspect-raise").click()
    said = page.find("#inspect-raised")
    expect(said).to_contain_text("29.mlp.up_proj has 8 bits")
    page.cell("map", NAME).click()
    page.drop("to", "6-bit")
    page.find("#inspect-raise").click()
    expect(said).to_contain_text(f"{NAME} has 6 bits")
    expect(said).to_contain_text("attention_bits=4")
    page.find("#inspect-compare").click()
    chip = page.find(".ql-chip").filter(has_text="Mixed")
    expect(chip).to_have_count(1)
    chip.locator("[data-options]").click()
    pattern = page.find('#options-panel details[open] [data-option="pattern"]')
    expect(pattern).to_have_value(f"29.mlp.up_proj=8;{NAME}=6")
    page.page.get_by_role("button", name=re.compile("^Remove Mixed")).click()
    page.show("Inspect")


def largest_input(folder: Path, path: str) -> float:
    """The largest |x| that a linear reads over the calibration tokens of the survey."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    text = (ASSETS / "calibration.txt").read_text("utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text).input_ids)
    count, length = 2048 // 128, 128
    starts = [i * length + (ids.numel() - 2048) * i // (count - 1) for i in range(count)]
    seen: list[torch.Tensor] = []
    model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.stack([ids[start : start + length] for start in starts]))
    return float(seen[0].abs().max())


def compared(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The KL divergence that a comparison shows for one linear at 3 bits, in the app's engine."""
    monkeypatch.setenv("QUANTLAB_HOME", str(home))
    options = {
        "arithmetic": "rtn", "attention_bits": 16, "feed_forward_bits": 16,
        "pattern": "1.mlp.down_proj=3",
    }  # fmt: skip
    variant = VariantSpec("mixed", None, tuple(sorted(options.items())))
    spec = RunSpec(
        str(folder), (variant,), eval_tokens=256, window=127, max_new_tokens=1, group_size=64
    )
    (record,) = pipeline.compare(spec, store=Store())
    return numbers.divergence(record.kl_divergence)


def test_a_model_of_ones_own(
    page: Page,
    model: Path,
    tmp_path: Path,
    native_off: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page.section("inspect-other")
    page.fill("model", str(model / "nowhere"))
    page.find("#inspect-read").click()
    expect(page.find("#inspect-progress [role=alert]")).to_contain_text("no such file or folder")
    page.fill("model", str(model))
    page.find("#inspect-read").click()
    expect(page.find("#inspect-cancel")).to_be_visible()
    expect(page.find("#inspect-progress")).to_contain_text("Linears ready: 14")
    expect(page.find("#inspect-origin")).to_contain_text("your model")
    page.show("Layer by linear")
    expect(page.find("#inspect-map [data-act]")).to_have_count(14)
    page.cell("map", "1.mlp.down_proj").click()
    page.show("Activation outliers")
    expect(page.cell("peaks", "1.mlp.down_proj")).to_have_attribute("aria-pressed", "true")
    # bfloat16 products move a sum a little, and logarithms in 8 bits some tenths of a percent.
    shows(page.fact("outlier", "peak"), largest_input(model, "model.layers.1.mlp.down_proj"), 0.02)
    expect(page.find("#inspect-note")).to_contain_text("Real values")
    page.show("Layer by linear")
    page.choose("bits", "3")
    expect(page.find("#inspect-map")).to_contain_text("Nothing was measured")
    page.section("inspect-measure")
    page.drop("tokens", "256")
    page.fill("blocks", "7")
    page.find("#inspect-start").click()
    said = page.find("#inspect-kl-progress")
    expect(said.locator("[role=alert]")).to_contain_text("blocks: 7; needs numbers from 0 to 1")
    page.fill("blocks", "1")
    page.fill("linears", "down_proj")
    page.find("#inspect-start").click()
    expect(page.find("#inspect-kl-cancel")).to_be_visible()
    expect(said).to_contain_text("Measured: 1.")
    expected = compared(model, tmp_path / "home", monkeypatch)
    expect(page.cell("map", "1.mlp.down_proj")).to_have_attribute("data-value", expected)
    expect(page.cell("map", "0.mlp.down_proj")).to_have_attribute("data-value", "")
    expect(page.find("#inspect-map")).to_contain_text("measured here")
    page.fill("blocks", "")
    page.fill("linears", "")
    page.drop("tokens", "4,096")
    page.find("#inspect-start").click()
    page.find("#inspect-kl-cancel").click()
    expect(said).to_contain_text("What was measured before is kept")
    expect(page.cell("map", "1.mlp.down_proj")).to_have_attribute("data-value", expected)
    page.find("#inspect-back").click()
    expect(page.find("#inspect-origin")).to_contain_text("SmolLM2")


@pytest.mark.parametrize(("dark", "language"), [(False, "en-US"), (True, "ja-JP")])
def test_pictures_of_every_view(chromium: Browser, app: App, dark: bool, language: str) -> None:
    """Nothing is wider than the page; a picture of each view is left to be looked at."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    context = chromium.new_context(
        viewport={"width": 1440, "height": 1000}, locale=language, reduced_motion="reduce"
    )
    page = Page(context.new_page(), app)
    for width in (1440, 390):
        page.page.set_viewport_size({"width": width, "height": 1000 if width > 640 else 844})
        page.open("?__theme=dark" if dark else "")
        page.find("#tab-inspect-button").click()
        for view, figure in (("outliers", "weights"), ("layers", "worst")):
            page.find(f"#inspect-tab-{view}-button").click()
            page.figure(figure)
            page.page.wait_for_timeout(700)
            right = page.page.evaluate("document.documentElement.scrollWidth")
            assert right <= width + 1, view
            assert page.cut_titles() == []
            kind = f"{width}-{'dark' if dark else 'light'}"
            page.page.screenshot(path=SHOTS / f"{view}-{kind}.png", full_page=True)
    assert page.problems == []
    context.close()
