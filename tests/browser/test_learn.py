"""The Learn tab in a real Chromium: every step of every walkthrough is driven by hand, and what it
shows is recomputed here."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, expect

from quantlab.learn import material, quiz, records
from quantlab.learn.material import Slice
from quantlab.ui.lessons import LESSONS
from tests.browser.app import ROOT, App
from tests.browser.tab import PATIENCE, Kept, Tab

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("learn")]

SHOTS = ROOT / "screenshots" / "learn"
STEPS = [
    (lesson.name, number)
    for lesson in LESSONS.values()
    for number in range(1, len(lesson.steps) + 1)
]


class Page(Tab):
    """The tab with the gestures of a walkthrough."""

    def lesson(self, name: str, number: int = 1) -> Locator:
        """Open a lesson by its place in the list, then one of its steps."""
        self.find(f'#learn-nav [data-act="{name}"]').click()
        expect(self.find(f"#lesson-{name}")).to_be_visible()
        step = LESSONS[name].steps[number - 1]
        # A walkthrough goes forward by its own button; what was seen can be clicked.
        buttons = [self.find(f"#step-{self.id(name, at + 1)}-button") for at in range(number)]
        expect(buttons[0]).to_be_visible()
        for at in range(1, number):
            if buttons[at].is_disabled():
                move = self.find(f"#step-{self.id(name, at)}").get_by_role("button", name="Next")
                move.or_(self.find(f"#step-{self.id(name, at)}").get_by_text("次へ")).click()
                expect(buttons[at]).to_be_enabled()
        buttons[-1].click()
        text = self.find(f"#text-{self.id(name, number)} h3")
        expect(text).to_be_visible()
        if step.figure:
            expect(self.figure(name, number).locator(".main-svg").first).to_be_visible()
        return self.find(f"#picture-{self.id(name, number)}")

    @staticmethod
    def id(name: str, number: int) -> str:
        return f"{name}-{LESSONS[name].steps[number - 1].name.replace('_', '-')}"

    def figure(self, name: str, number: int) -> Locator:
        return self.find(f"#figure-{self.id(name, number)}")

    def slide(self, name: str, number: int, control: str, value: float) -> None:
        """Type a slider's number, as a person without a mouse does."""
        field = self.find(f"#{self.id(name, number)}-{control} input[type=number]")
        field.fill(f"{value:g}")
        field.press("Enter")

    def choose(self, name: str, number: int, control: str, label: str) -> None:
        box = self.find(f"#{self.id(name, number)}-{control}")
        box.get_by_label(label, exact=True).check()

    def fact(self, name: str, number: int, key: str) -> Locator:
        return self.find(f'#picture-{self.id(name, number)} [data-fact="{key}"] dd')


@pytest.fixture(scope="module")
def kept(chromium: Browser, app: App) -> Iterator[Kept[Page]]:
    kept = Kept(chromium, app, Page, "Learn")
    yield kept
    kept.close()


@pytest.fixture
def page(kept: Kept[Page], request: pytest.FixtureRequest) -> Iterator[Page]:
    """One browser tab for all walkthroughs."""
    for opened in kept.lend(request):
        expect(opened.find("#learn-nav button")).to_have_count(len(LESSONS))
        yield opened


@pytest.fixture(scope="module")
def one() -> Slice:
    return material.load()


def number(text: str) -> float:
    """The number that a fact shows: `1.23%`, `16.4×`, `0.0123`."""
    value = float(re.sub(r"[%×,]", "", text))
    return value / 100 if text.endswith("%") else value


def shows(fact: Locator, value: float, rel: float = 6e-3) -> None:
    """Wait until the fact shows this value."""
    for _ in range(PATIENCE // 100):
        text = fact.text_content() or ""
        if re.fullmatch(r"[-\d.,e+]+[%×]?", text) and number(text) == pytest.approx(value, rel=rel):
            return
        fact.page.wait_for_timeout(100)
    raise AssertionError(f"{fact.text_content()} is not {value}")


def grid_error(values: np.ndarray, bits: int, group: int, skip: int) -> float:
    """RMS error of absmax rounding in groups, without the value at `skip`."""
    parts = values.reshape(-1, group)
    step = np.abs(parts).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    difference = (np.round(parts / step) * step - parts).reshape(-1)
    return float(np.sqrt(np.square(np.delete(difference, skip)).mean()))


def relative(one: Slice, back: np.ndarray) -> float:
    x, w = one.inputs.double().numpy(), one.weight.double().numpy()
    return float(np.square(x @ (back - w).T).sum() / np.square(x @ w.T).sum())


def zero_point(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Plain zero-point rounding in groups."""
    parts = weight.reshape(len(weight), -1, group)
    low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
    scale = ((high - low) / (2**bits - 1))[..., None]
    zero = np.round(-low[..., None] / scale)
    codes = np.clip(np.round(parts / scale) + zero, 0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(weight.shape)


def test_the_tab_says_what_it_shows(page: Page) -> None:
    origin = page.find("#learn-origin .ql-lesson-origin")
    expect(origin).to_contain_text("SmolLM2")
    expect(origin).to_contain_text("precomputed")
    badge = origin.locator(".ql-badge")
    badge.focus()
    expect(page.find("#ql-tip")).to_contain_text(material.origin().machine)
    expect(page.find("#ql-tip")).to_contain_text(material.origin().date[:10])


def test_formats(page: Page, one: Slice) -> None:
    picture = page.lesson("formats")
    value = float(one.weight[0, 0])

    def bits(name: str) -> str:
        return "".join(picture.locator(f'[data-format="{name}"] [data-act]').all_text_contents())

    def spelled(kind: str, value: float) -> str:
        return "".join(f"{byte:08b}" for byte in struct.pack(kind, value))

    expect(picture.locator("[data-format]")).to_have_count(7)
    assert bits("fp32") == spelled(">f", value)
    assert bits("fp16") == spelled(">e", value)
    field = page.find("#formats-bits-value textarea, #formats-bits-value input").first
    page.type(field, "20.23")
    expect(picture.locator('[data-format="fp16"]')).to_have_attribute(
        "data-value", repr(struct.unpack(">e", struct.pack(">e", 20.23))[0])
    )
    assert bits("fp32") == spelled(">f", 20.23)
    flip = picture.locator('[data-act="flip:fp16:0"]')
    flip.focus()
    flip.press("Enter")
    expect(field).to_have_value(re.compile(r"^-20\.2"))
    expect(picture.locator('[data-act="flip:fp16:0"]')).to_be_focused()
    field.fill("<img src=x onerror=window.hacked=1>")
    expect(picture.locator("[role=alert]")).to_contain_text("needs a number")
    assert page.page.evaluate("window.hacked") is None
    page.lesson("formats", 2)
    page.slide("formats", 2, "magnitude", 3)
    shows(page.fact("formats", 2, "spacing_fp16"), 2.0**-10)
    shows(page.fact("formats", 2, "spacing_bf16"), 2.0**-7)
    page.slide("formats", 2, "magnitude", -4)
    shows(page.fact("formats", 2, "spacing_int8"), float(one.weight[0].abs().max()) / 127 * 16)


def test_matrix(page: Page) -> None:
    picture = page.lesson("matrix")

    def cells(name: str) -> np.ndarray:
        inputs = picture.locator(f'[data-cell^="{name}:"]')
        expect(inputs).to_have_count(12)  # A step that has just come into view is painted anew.
        return np.array([float(cell.input_value()) for cell in inputs.all()]).reshape(3, 4)

    def error(restored: tuple[np.ndarray, np.ndarray]) -> float:
        exact = cells("x") @ cells("w").T
        off = restored[0] @ restored[1].T - exact
        return float(np.sqrt(np.square(off).mean() / np.square(exact).mean()))

    def absmax(values: np.ndarray, axis: int | None = None) -> np.ndarray:
        step = np.abs(values).max(axis, keepdims=axis is not None) / 127
        return np.round(values / step) * step

    shows(page.fact("matrix", 1, "product_absmax"), error((absmax(cells("x")), absmax(cells("w")))))
    cell = picture.locator('[data-cell="x:1:0"]')
    cell.fill("9.5")
    cell.press("Enter")
    expect(picture.locator('[data-cell="x:1:0"]')).to_have_attribute("value", "9.5")
    shows(page.fact("matrix", 1, "product_absmax"), error((absmax(cells("x")), absmax(cells("w")))))
    picture.locator('[data-cell="x:1:0"]').fill("<b>")
    picture.locator('[data-cell="x:1:0"]').press("Enter")
    expect(picture.locator("[role=alert]")).to_contain_text("cell: needs a number")
    picture = page.lesson("matrix", 2)
    expect(picture.locator('[data-cell="x:1:0"]')).to_have_attribute("value", "9.5")
    x, w = cells("x"), cells("w")
    restored = []
    for values in (x, w):
        step = (max(values.max(), 0) - min(values.min(), 0)) / 255
        zero = np.round(-min(values.min(), 0) / step)
        restored.append((np.clip(np.round(values / step) + zero, 0, 255) - zero) * step)
    shows(page.fact("matrix", 2, "product_zero_point"), error((restored[0], restored[1])))
    picture.locator('[data-act="reset"]').click()
    expect(picture.locator('[data-cell="x:1:0"]')).not_to_have_attribute("value", "9.5")
    picture = page.lesson("matrix", 3)
    page.slide("matrix", 3, "threshold", 5)
    x, w = cells("x"), cells("w")
    apart = (np.abs(x) >= 5).any(0)
    assert apart.any()
    expect(picture.locator('td.ql-matrix-apart input[data-cell^="x:"]')).to_have_count(
        3 * int(apart.sum())
    )
    w8 = absmax(w, 1)
    small = np.where(apart, 0.0, x)
    step = np.abs(np.where(np.abs(x) >= 5, 0, x)).max(1, keepdims=True) / 127
    got = np.round(small / step) * step @ w8.T + np.where(apart, x, 0) @ w8.T
    exact = x @ w.T
    expected = float(np.sqrt(np.square(got - exact).mean() / np.square(exact).mean()))
    shows(page.fact("matrix", 3, "product_llm_int8"), expected)


def test_outlier(page: Page, one: Slice) -> None:
    row = one.weight[0, :128].double().numpy()
    place = int(np.abs(row).argmax())
    page.lesson("outlier")
    page.slide("outlier", 1, "times", 12)
    stretched = row.copy()
    stretched[place] *= 12
    shows(page.fact("outlier", 1, "rms"), grid_error(stretched, 4, 128, place))
    page.lesson("outlier", 2)
    page.choose("outlier", 2, "group-size", "16")
    stretched[place] = row[place] * 10
    shows(page.fact("outlier", 2, "rms"), grid_error(stretched, 4, 16, place))
    shows(page.fact("outlier", 2, "bits_per_weight"), 5.0)
    page.lesson("outlier", 3)
    page.slide("outlier", 3, "bits", 3)
    shows(page.fact("outlier", 3, "rms_least"), grid_error(stretched, 3, 16, place))
    page.choose("outlier", 3, "grid", "zero-point")
    shows(page.fact("outlier", 3, "bits_least"), 3 + (16 + 3) / 16)
    page.lesson("outlier", 4)
    peaks = one.inputs.abs().amax(0).double().numpy()
    shows(page.fact("outlier", 4, "channel_ratio"), peaks.max() / np.sort(peaks)[127], rel=0.04)
    page.slide("outlier", 4, "bits", 4)
    x = np.delete(one.inputs.double().numpy(), int(peaks.argmax()), 1)
    step = peaks.max() / 7
    expected = np.sqrt(np.square(np.round(x / step) * step - x).mean() / np.square(x).mean())
    shows(page.fact("outlier", 4, "error_with"), float(expected))


def smooth_error(one: Slice, alpha: float | None) -> float:
    """Relative output error of W8A8 with static activations."""
    x, w = one.inputs.double().numpy(), one.weight.double().numpy()
    s = np.ones(w.shape[1])
    if alpha is not None:
        s = np.abs(x).max(0) ** alpha / np.abs(w).max(0) ** (1 - alpha)
    xs, ws = x / s, w * s
    step = np.abs(ws).max(1, keepdims=True) / 127
    x_step = (max(xs.max(), 0) - min(xs.min(), 0)) / 255
    zero = np.round(-min(xs.min(), 0) / x_step)
    back = (np.clip(np.round(xs / x_step) + zero, 0, 255) - zero) * x_step
    wanted = x @ w.T
    got = back @ (np.round(ws / step) * step).T
    return float((np.square(got - wanted).sum(1) / np.square(wanted).sum(1)).mean())


def test_smoothing(page: Page, one: Slice) -> None:
    page.lesson("smoothing")
    shows(page.fact("smoothing", 1, "unsmoothed"), smooth_error(one, None), rel=0.02)
    page.slide("smoothing", 1, "alpha", 0.8)
    shows(page.fact("smoothing", 1, "output_error"), smooth_error(one, 0.8), rel=0.02)
    page.lesson("smoothing", 2)
    page.slide("smoothing", 2, "alpha", 0.3)
    shows(page.fact("smoothing", 2, "output_error"), smooth_error(one, 0.3), rel=0.02)
    errors = [smooth_error(one, step / 20) for step in range(21)]
    shows(page.fact("smoothing", 2, "best_error"), min(errors), rel=0.02)
    page.choose("smoothing", 2, "activations", "dynamic, one a token")
    expect(page.fact("smoothing", 2, "unsmoothed")).not_to_have_text(re.compile("0.0965"))


def test_columns(page: Page, one: Slice) -> None:
    x = one.inputs[:, :40].double().numpy()
    moment = x.T @ x / len(x)
    page.lesson("columns")
    page.slide("columns", 1, "column", 7)
    size = np.sqrt(np.diag(moment))
    strongest = np.abs(moment[7] / size / size[7])[8:].max()
    shows(page.fact("columns", 1, "strongest"), round(float(strongest), 2))
    page.lesson("columns", 2)
    page.slide("columns", 2, "done", 40)
    w = one.weight[:16, :40].double().numpy()
    plain = zero_point(w, 3, 40)
    expected = np.square(x @ (plain - w).T).sum() / np.square(x @ w.T).sum()
    shows(page.fact("columns", 2, "error_rtn"), float(expected), rel=0.02)
    gptq = number(page.fact("columns", 2, "error_gptq").text_content() or "")
    assert gptq < float(expected)
    page.slide("columns", 2, "done", 0)
    shows(page.fact("columns", 2, "error_gptq"), 0.0)
    page.lesson("columns", 3)
    closed = page.fact("columns", 3, "closed")
    expect(closed).to_have_text(re.compile(r"\d+%"))
    before = closed.text_content() or ""
    page.slide("columns", 3, "bits", 2)
    expect(closed).not_to_have_text(before)


def test_salience(page: Page, one: Slice) -> None:
    x, w = one.inputs.double().numpy(), one.weight.double().numpy()
    page.lesson("salience")
    page.slide("salience", 1, "percent", 4)
    plain = zero_point(w, 3, 64)
    shows(page.fact("salience", 1, "kept_none"), relative(one, plain), rel=0.02)
    top = np.argsort(-np.abs(x).mean(0))[: round(0.04 * 256)]
    plain[:, top] = w[:, top]
    shows(page.fact("salience", 1, "kept_activations"), relative(one, plain), rel=0.02)

    def scaled(exponent: float) -> float:
        s = np.abs(x).mean(0) ** exponent
        s /= np.sqrt(s.max() * s.min())
        return relative(one, zero_point(w * s, 3, 64) / s)

    page.lesson("salience", 2)
    page.slide("salience", 2, "exponent", 0.7)
    shows(page.fact("salience", 2, "error_here"), scaled(0.7), rel=0.03)
    page.lesson("salience", 3)
    page.slide("salience", 3, "exponent", 0.25)
    shows(page.fact("salience", 3, "error_scaled"), scaled(0.25), rel=0.03)


def test_codebooks(page: Page, one: Slice) -> None:
    w = one.weight.double().numpy().reshape(-1, 32)
    peak = np.abs(w).max(1, keepdims=True)
    page.lesson("codebooks")
    page.choose("codebooks", 1, "block-size", "32")
    even = np.round(w / peak * 7) / 7 * peak
    expected = np.sqrt(np.square(even - w).mean() / np.square(w).mean())
    shows(page.fact("codebooks", 1, "rms_int4"), float(expected))
    page.choose("codebooks", 1, "codebook", "INT4")
    expect(
        page.figure("codebooks", 1).locator(".barlayer .trace").nth(1).locator(".point")
    ).to_have_count(15)
    page.lesson("codebooks", 2)
    page.choose("codebooks", 2, "block-size", "128")
    shows(page.fact("codebooks", 2, "bits_plain"), 4.25)
    shows(page.fact("codebooks", 2, "bits_double"), 4 + 8 / 128 + 64 / w.size)


def test_superblock(page: Page, one: Slice) -> None:
    picture = page.lesson("superblock")
    page.slide("superblock", 1, "row", 5)
    page.slide("superblock", 1, "block", 2)
    part = one.weight[5, 64:96].numpy()
    data = gguf.quantize(part[None], gguf.GGMLQuantizationType.Q4_0).tobytes()
    expect(picture.locator("[data-act^='byte:']")).to_have_text([f"{byte:02x}" for byte in data])
    picture.locator('[data-act="byte:3"]').click()
    says = picture.locator(".ql-byte-says")
    expect(says).to_contain_text(f"{data[3]:08b}")
    expect(says).to_contain_text(f"Low half: code {data[3] & 15}, weight 1 ")
    expect(says).to_contain_text(f"High half: code {data[3] >> 4}, weight 17 ")
    picture = page.lesson("superblock", 2)
    expect(picture.locator("[data-act^='byte:']")).to_have_count(144)
    shown = bytes.fromhex("".join(picture.locator("[data-act^='byte:']").all_text_contents()))
    back = gguf.dequantize(np.frombuffer(shown, np.uint8), gguf.GGMLQuantizationType.Q4_K)
    w = one.weight[0, :256].numpy()
    expected = float(np.sqrt(np.square(back - w).mean() / np.square(w).mean()))
    shows(page.fact("superblock", 2, "block_error"), expected)
    picture.locator('[data-act="byte:5"]').click()
    expect(says := picture.locator(".ql-byte-says")).to_contain_text("Sub-block 1: scale ")
    expect(says).to_contain_text(f"scale {shown[5] & 63},")
    page.lesson("superblock", 3)
    page.slide("superblock", 3, "rows", 3)
    weight = one.weight[:3, :256].numpy()
    kind = gguf.GGMLQuantizationType.Q4_0
    back = gguf.dequantize(gguf.quantize(weight, kind), kind)
    expected = float(np.sqrt(np.square(back - weight).mean() / np.square(weight).mean()))
    shows(page.fact("superblock", 3, "error_q4_0"), expected)


def test_training(page: Page) -> None:
    shipped = records.shipped()[1]
    record = next(r for r in shipped.records if r.method == "efficientqat")
    picture = page.lesson("training")
    expect(picture).to_contain_text(shipped.date)
    page.slide("training", 1, "block-number", 12)
    losses = record.curves["block_ap"][11]
    shows(page.fact("training", 1, "loss_begin"), sum(losses[:8]) / 8)
    shows(page.fact("training", 1, "loss_end"), sum(losses[-8:]) / 8)
    page.lesson("training", 2)
    expect(page.fact("training", 2, "qat_perplexity")).to_have_text(f"{record.perplexity:.2f}")
    page.lesson("training", 3)
    page.choose("training", 3, "phase", "E2E-QP")
    rows, columns = material.load().shape
    expect(page.fact("training", 3, "moving_total")).to_have_text(f"{rows * columns // 64:,}")


def test_quiz(page: Page) -> None:
    measured = records.shipped()[0]
    picture = page.lesson("quiz")
    rows = picture.locator("li[data-variant]")

    wanted = [r.variant for r in quiz.ranking(measured)]

    def order() -> list[str]:
        # In one go, and whole: the list is painted anew after every move.
        expect(rows).to_have_count(len(wanted))
        found: list[str] = rows.evaluate_all("(rows) => rows.map((row) => row.dataset.variant)")
        return found if len(found) == len(wanted) else order()

    for place, name in enumerate(wanted):
        while (at := order().index(name)) > place:
            rows.nth(at).locator('[data-act^="up:"]').click()
            expect(rows.nth(at - 1)).to_have_attribute("data-variant", name)
    assert order() == wanted
    page.lesson("quiz", 2)
    pairs = len(wanted) * (len(wanted) - 1) // 2
    undecided = int(page.fact("quiz", 2, "pairs_open").text_content() or "")
    expect(page.fact("quiz", 2, "pairs_right")).to_have_text(
        f"{pairs - undecided} / {pairs - undecided}"
    )
    expect(page.fact("quiz", 2, "winner_found")).to_have_text("yes")


def test_another_layer_and_another_model(page: Page, model: Path) -> None:
    page.lesson("outlier", 4)
    page.section("learn-other")
    layer = page.find("#learn-layer input")
    layer.click()
    page.page.get_by_role("option", name="11.mlp.down_proj").click()
    origin = page.find("#learn-origin .ql-lesson-origin")
    expect(origin).to_have_attribute("data-layer", "11.mlp.down_proj")
    peaks = material.load(layer="11.mlp.down_proj").inputs.abs().amax(0).double().numpy()
    shows(page.fact("outlier", 4, "channel_ratio"), peaks.max() / np.sort(peaks)[127], rel=0.04)
    page.find("#learn-model textarea, #learn-model input").first.fill(str(model / "nowhere"))
    page.find("#learn-load").click()
    expect(page.find("#learn-progress [role=alert]")).to_contain_text("no such file or folder")
    page.find("#learn-model textarea, #learn-model input").first.fill(str(model))
    page.find("#learn-load").click()
    expect(page.find("#learn-cancel")).to_be_visible()
    expect(page.find("#learn-progress")).to_contain_text("layers are ready")
    expect(page.find("#learn-cancel")).to_be_hidden()
    expect(origin).to_have_attribute("data-model", str(model))
    expect(origin).to_contain_text("your model")
    expect(page.fact("outlier", 4, "channel_ratio")).to_have_text(re.compile("×"))
    page.find("#learn-back").click()
    expect(origin).to_have_attribute("data-model", "bundled")


def test_a_link_opens_a_step(tab: Tab) -> None:
    tab.page.goto(f"{tab.app.url}?lesson=columns&step=2")
    expect(tab.find("#lesson-columns")).to_be_visible()
    expect(tab.find("#text-columns-walk h3")).to_be_visible()
    expect(tab.find("#figure-columns-walk .main-svg").first).to_be_visible()
    tab.find('#learn-nav [data-act="quiz"]').click()
    tab.page.wait_for_url("**/?*lesson=quiz*")
    tab.show("Compare")
    tab.page.wait_for_function("!location.search.includes('lesson')")


@pytest.mark.parametrize(
    ("width", "dark", "language"),
    [(1440, False, "ja-JP"), (390, True, "en-US")],
)
def test_pictures_of_every_step(
    chromium: Browser, app: App, width: int, dark: bool, language: str
) -> None:
    """Nothing is wider than the page; a picture of each step is left to be looked at."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    context = chromium.new_context(
        viewport={"width": width, "height": 1000 if width > 640 else 844},
        locale=language,
        reduced_motion="reduce",
    )
    page = Page(context.new_page(), app)
    page.page.goto(f"{app.url}?lesson=formats&step=1" + ("&__theme=dark" if dark else ""))
    expect(page.find("#lesson-formats")).to_be_visible()
    for name, step in STEPS:
        page.lesson(name, step)
        page.page.wait_for_timeout(250)
        right = page.page.evaluate(
            "Math.max(document.documentElement.scrollWidth, ...[...document.querySelectorAll("
            "'#learn-main, .ql-step-side, .ql-step-picture, .ql-bytes, .ql-bits, .ql-matrix')]"
            ".map((one) => one.getBoundingClientRect().right))"
        )
        assert right <= width + 1, (name, step)
        assert page.cut_titles() == []
        kind = f"{width}-{'dark' if dark else 'light'}"
        page.page.screenshot(path=SHOTS / f"{page.id(name, step)}-{kind}.png", full_page=True)
    assert page.problems == []
    context.close()
