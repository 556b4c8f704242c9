"""Pairs, forks and the calibration lab in a real Chromium, on real runs of a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, expect

from quantlab import labs, pipeline
from quantlab.engine import encode_prompt
from quantlab.models.loading import load_tokenizer_of
from quantlab.plots import numbers
from quantlab.runs import ACTIVE, Run
from quantlab.store import Store
from quantlab.types import Generation
from quantlab.variants import open_runner, read_about
from tests.browser.app import App
from tests.browser.tab import PATIENCE, Tab
from tests.browser.test_outputs import HOSTILE, again, keep, looks

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def finished(chromium: Browser, app: App, model: Path) -> str:
    """A finished comparison of three, made through the page once; its run id."""
    context = chromium.new_context(viewport={"width": 1440, "height": 1000}, locale="en-US")
    tab = Tab(context.new_page(), app).open()
    tab.small(model, seed=41)
    tab.number("max-new-tokens", 24)
    tab.only_variants("BF16", "RTN 4-bit", "GPTQ 4-bit")
    run_id = tab.run()
    tab.status("Finished")
    context.close()
    return run_id


def resampled(first: list[float], second: list[float]) -> tuple[float, float, float]:
    """Mean and 95% interval of the paired difference, drawn one resample at a time with another
    generator than the program's."""
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    draw = np.random.RandomState(7)
    means = sorted(float(np.mean(draw.choice(gaps, len(gaps)))) for _ in range(4000))
    return float(np.mean(gaps)), means[100], means[3899]


def test_every_pair_has_its_sentence(chromium: Browser, app: App, finished: str) -> None:
    records = {r.variant: r for r in Store(app.home).run(finished).records}
    segments = {name: record.segments for name, record in records.items()}
    wanted = [
        resampled(segments["gptq:4"]["nll"], segments["bf16"]["nll"]),
        resampled(segments["rtn:4"]["nll"], segments["bf16"]["nll"]),
        resampled(segments["gptq:4"]["kl"], segments["rtn:4"]["kl"]),
    ]
    names = ["GPTQ 4-bit", "RTN 4-bit", "GPTQ 4-bit"]
    order = [one.label for one in Store(app.home).run(finished).spec.variants]
    if order.index("rtn:4") < order.index("gptq:4"):
        wanted = [wanted[1], wanted[0], (-wanted[2][0], -wanted[2][2], -wanted[2][1])]
        names = ["RTN 4-bit", "GPTQ 4-bit", "RTN 4-bit"]
    for name, tab in looks(chromium, app, f"?run={finished}"):
        tab.show("Compare")
        tab.section("pairs-section")
        lines = tab.find("#pairs .ql-pair-list li")
        expect(lines).to_have_count(3)
        for place, (mean, low, high) in enumerate(wanted):
            text = lines.nth(place).inner_text()
            gap, half = text.split(" ± ")
            shown, width = float(gap.split()[-1]), float(half.split()[0])
            # Another generator's interval of few segments is about a tenth off.
            assert width == pytest.approx((high - low) / 2, rel=0.25, abs=1e-4), text
            clear = low > 0 or high < 0
            assert abs(shown) == pytest.approx(abs(mean), abs=max(width / 10, 1e-4)), text
            assert ("indistinguishable" not in text) == clear, text
            assert names[place] in text
        cells = tab.find("#pairs tbody td")
        expect(cells).to_have_count(2 * 3)
        cells.first.locator("span").hover()
        expect(tab.find("#ql-tip")).to_contain_text("95% interval of row minus column")
        keep(tab.page, f"compare-pairs-{name}")


def greedy(app: App, run: Run, variant: str, forced: tuple[int, ...], limit: int) -> list[int]:
    """The variant's answer to the first prompt behind forced tokens, decoded here."""
    source = pipeline._same_model([], run.spec)
    tokenizer = load_tokenizer_of(source)
    record = next(r for r in run.records if r.variant == variant)
    prepared = read_about(Store(app.home).artifact(record.artifact or ""))
    assert prepared is not None
    spec = next(v for v in run.spec.variants if v.label == variant)
    session = open_runner(spec, prepared, source, None, run.spec).session()
    said: list[int] = []
    token = session.prefill(encode_prompt(tokenizer, run.spec.prompts[0]))
    while len(said) < limit:
        token = forced[len(said)] if len(said) < len(forced) else token
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
        token = session.step(token)
    return said


def test_a_chain_of_forks(
    chromium: Browser,
    app: App,
    finished: str,
    tab: Tab,
    native_off: None,
) -> None:
    run = Store(app.home).run(finished)
    answers = {r.variant: r.outputs[0] for r in run.records}
    original, own = answers["bf16"], answers["rtn:4"]
    assert own.first_divergence is not None, "seed 41 gives answers that part"
    tab.open(f"?run={finished}")
    tab.show("Outputs")
    tab.section("forks-section")
    chain = tab.find('.ql-fork-chain[data-chain="rtn:4"]')
    forks = chain.locator(".ql-fork[data-at]")
    expect(forks).to_have_count(1)
    at, links = own.first_divergence, 1
    for _ in range(2):
        fork = forks.nth(links - 1)
        expect(fork).to_have_attribute("data-at", str(at))
        shares = fork.locator(".ql-top").first.locator("li span")
        wanted = [f"{100 * chance:.1f}%" for _, chance, _ in original.choices[at]]
        expect(shares).to_have_text(wanted)
        tie = original.choices[at][0][1] - original.choices[at][1][1] < 0.1
        expect(fork.locator("[data-flip]")).to_have_attribute("data-flip", "tie" if tie else "sure")
        chain.locator(".ql-fork-force").press("Enter")
        forced = original.tokens[: at + 1]
        said = greedy(app, run, "rtn:4", forced, 24)
        apart = [i for i, (a, b) in enumerate(zip(said, original.tokens, strict=False)) if a != b]
        if not apart:
            expect(chain.locator(".ql-fork-end")).to_be_visible()
            break
        links += 1
        expect(forks).to_have_count(links)
        expect(forks.nth(links - 1).locator("p strong").first).to_contain_text(
            f"further tokens shared: {apart[0] - at - 1}."
        )
        at = apart[0]
    assert links > 1
    # The chain outlives the page, in any window; its steps are no lines of the history.
    for name, other in looks(chromium, app, f"?run={finished}"):
        other.section("forks-section")
        expect(other.find('[data-chain="rtn:4"] .ql-fork[data-at]')).to_have_count(links)
        keep(other.page, f"outputs-forks-{name}")
    tab.show("Runs")
    steps = [one for one in Store(app.home).runs() if one.spec.forced]
    assert len(steps) >= links - 1
    for step in steps:
        expect(tab.find(f'[data-run-row="{step.id}"]')).to_have_count(0)


def test_what_a_model_wrote_cannot_run_at_a_fork(tab: Tab, app: App, finished: str) -> None:
    top = ((5, 0.6, HOSTILE), (6, 0.4, HOSTILE))
    answers = {
        variant: (Generation(HOSTILE, HOSTILE, (1, number), (HOSTILE,) * 2, choices=(top, top)),)
        for number, variant in enumerate(("bf16", "rtn:4", "gptq:4"), 2)
    }
    run_id = again(app, finished, answers)
    tab.open(f"?run={run_id}")
    tab.show("Outputs")
    tab.section("forks-section")
    expect(tab.find(".ql-fork-chain")).to_have_count(2)
    expect(tab.find(".ql-fork-before").first).to_contain_text("<script>")
    assert tab.page.title() == "QuantLab"
    assert tab.find("#forks img").count() == 0


def lab_form(tab: Tab, model: Path, **numbers: int) -> None:
    """Show the calibration lab with this model and sizes."""
    tab.show("Inspect")
    tab.show("Calibration lab")
    field = tab.find("#lab-model input")
    field.fill(str(model))
    field.press("Enter")
    field.blur()
    tab.section("lab-sizes")
    sizes = {"calibration_length": 32, "window": 64, "group_size": 32, **numbers}
    for name, value in sizes.items():
        tab.number(f"lab-{name.replace('_', '-')}", value)


def test_cancelled_forks_and_labs_end_and_leave_the_rest(
    app: App, finished: str, model: Path, tab: Tab
) -> None:
    """A lab that would take minutes, and behind it in the queue a fork of a finished comparison:
    both are cancelled by their own buttons, and then the fork is forced after all."""
    store = Store(app.home)
    run_id = again(app, finished)
    records = store.run(run_id).records
    tab.open(f"?run={run_id}")
    lab_form(tab, model, calibration_tokens=8192, eval_tokens=8192)
    # Before anything starts the page says what it will take.
    expect(tab.find("#lab-estimate strong").first).to_have_text(re.compile(r"^\d+:\d\d$"))
    tab.find("#lab-start").click()
    expect(tab.find("#lab-message")).to_contain_text("4 cells in 2 comparisons")
    expect(tab.find("#lab-progress .ql-bar")).to_be_visible()
    known = labs.latest(store)
    assert known is not None

    tab.show("Outputs")
    tab.section("forks-section")
    chain = tab.find('.ql-fork-chain[data-chain="rtn:4"]')
    expect(chain.locator(".ql-fork[data-at]")).to_have_count(1)
    chain.locator(".ql-fork-force").click()
    expect(chain.locator(".ql-fork-pending")).to_contain_text("Waiting in line")
    expect(chain.locator(".ql-fork-force")).to_have_count(0)
    chain.locator(".ql-fork-stop").click()
    expect(chain.locator(".ql-fork-stop")).to_have_count(0)
    expect(chain.locator(".ql-fork-pending")).to_contain_text("Cancelled")
    expect(chain.locator(".ql-fork[data-at]")).to_have_count(1)
    (step,) = [one for one in store.runs() if one.spec.forced and one.parent == run_id]
    assert step.status == "cancelled"
    assert any(store.run(one).status in ACTIVE for one in known.runs), "the lab goes on"

    tab.show("Inspect")
    tab.find("#lab-cancel").click()
    expect(tab.find("#lab-cancel")).to_be_hidden()
    expect(tab.find("#lab-progress")).to_contain_text("2 of 2")
    assert [store.run(one).status for one in known.runs] == ["cancelled"] * 2
    marks = tab.page.evaluate(
        "() => document.querySelector('#lab-figure .js-plotly-plot').layout.annotations"
        ".map(one => one.text)"
    )
    cells = sum(len(store.run(one).records) < 2 for one in known.runs)
    assert len([text for text in marks if "cancelled" in text]) >= cells
    expect(tab.find("#lab-start")).to_be_enabled()

    # Nothing finished is lost, and what was cancelled can be had after all.
    assert store.run(run_id).records == records
    tab.show("Compare")
    expect(tab.find("#results-table tbody[data-state=finished]")).to_have_count(3)
    tab.show("Outputs")
    chain.locator(".ql-fork-force").click()
    ended = chain.locator(".ql-fork-end").or_(chain.locator(".ql-fork[data-at]").nth(1))
    expect(ended.first).to_be_visible()
    assert {one.status for one in store.runs() if one.spec.forced and one.parent == run_id} == {
        "cancelled",
        "finished",
    }


def test_the_lab_fills_its_matrix(
    chromium: Browser,
    app: App,
    model: Path,
    tab: Tab,
    tmp_path: Path,
    native_off: None,
) -> None:
    tab.open()
    lab_form(tab, model, calibration_tokens=256, eval_tokens=192)
    # Only GPTQ, calibrated on the project's text and on a pasted one.
    for chosen in ("#lab-methods", "#lab-calibration"):
        tab.find(f"{chosen} .token-remove").nth(1).click()
    tab.section("lab-own")
    tab.find("#lab-paste textarea").fill(f"{HOSTILE} The sea is salty. " * 40)
    tab.find("#lab-add-calibration").click()
    expect(tab.find("#lab-calibration")).to_contain_text("pasted-")
    # Long enough in bytes to be queued, too short in tokens to be read.
    tab.find("#lab-paste textarea").fill(
        "The sea is salty and the river carries timber to it.  " * 2
    )
    tab.find("#lab-add-evaluation").click()
    expect(tab.find("#lab-evaluation")).to_contain_text("pasted-")
    tab.find("#lab-start").click()
    expect(tab.find("#lab-message")).to_contain_text("4 cells in 4 comparisons")
    expect(tab.find("#lab-cancel")).to_be_visible()
    expect(tab.find("#lab-cancel")).to_be_hidden(timeout=4 * PATIENCE)
    expect(tab.find("#lab-progress")).to_contain_text("4 of 4")
    heat = "() => document.querySelector('#lab-figure .js-plotly-plot').data[0]"
    shown = tab.page.evaluate(f"(({heat})().z).map(row => Array.from(row))")
    texts = tab.page.evaluate(f"({heat})().text")
    store = Store(app.home)
    known = labs.latest(store)
    assert known is not None
    runs = [store.run(one) for one in known.runs]
    assert len(runs) == 4
    for run in runs:
        down = known.plan.calibrations.index(run.spec.calibration)
        if run.spec.text != "project":
            assert (run.status, shown[down][1], texts[down][1]) == ("failed", None, "")
            continue
        (record,) = run.records
        assert record.kl_divergence == shown[down][0]
        assert numbers.divergence(record.kl_divergence) in texts[down][0]
        assert numbers.perplexity(record.perplexity) in texts[down][0]
    # A cell is what a comparison of its own gives, made here from nothing.
    pasted = next(r for r in runs if r.spec.text == "project" != r.spec.calibration)
    (record,) = pipeline.compare(pasted.spec, store=Store(tmp_path / "own"))
    assert record.kl_divergence == pytest.approx(shown[1][0], rel=1e-6)
    failures = tab.find("#lab-notes .ql-lab-failures li")
    expect(failures).to_have_count(2)
    expect(failures.first).to_contain_text("one window takes 64")
    expect(tab.find("#lab-notes .ql-pair-list li")).to_have_count(1)
    artifacts = {r.artifact for run in runs for r in run.records if r.status == "finished"}
    assert len(artifacts) == 2
    for name, other in looks(chromium, app, ""):
        other.show("Inspect")
        other.show("Calibration lab")
        expect(other.find("#lab-figure .main-svg").first).to_be_visible()
        expect(other.find("#lab-notes .ql-lab-failures li")).to_have_count(2)
        assert other.page.title() == "QuantLab"
        assert other.find("#lab img").count() == 0
        keep(other.page, f"inspect-lab-{name}")
