"""The whole page in a real Chromium, driving the real pipeline on a tiny model."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from quantlab.store import Store
from tests.browser.app import App
from tests.browser.tab import Tab

pytestmark = pytest.mark.browser

FIGURES = ("perplexity-size", "kl-bits", "speed", "size")


@pytest.fixture(scope="module")
def finished(chromium: Browser, app: App, model: Path) -> str:
    """A finished comparison, made through the page once; its run id."""
    context = chromium.new_context(viewport={"width": 1440, "height": 1000}, locale="en-US")
    tab = Tab(context.new_page(), app).open()
    tab.small(model)
    tab.only_variants("BF16", "RTN 4-bit", "GPTQ 4-bit")
    run_id = tab.run()
    tab.status("Finished")
    context.close()
    return run_id


def test_first_load_teaches_and_is_ready(tab: Tab, app: App) -> None:
    tab.open("?run=nonsense")
    expect(tab.find("#header h1")).to_have_text("QuantLab")
    expect(tab.find("#tabs").get_by_role("tab")).to_have_text(
        ["Compare", "Outputs", "Inspect", "Learn", "Advisor", "Runs"]
    )
    names = ["BF16", "RTN 4-bit", "SmoothQuant 8-bit", "GPTQ 4-bit", "AWQ 4-bit", "GGUF Q4_K_M"]
    expect(tab.find(".ql-chip-name")).to_have_text(names)
    expect(tab.find("#run")).to_be_enabled()
    expect(tab.find("#estimate")).to_contain_text(re.compile(r"\d+:\d\d"))
    expect(tab.find("#message-run")).to_contain_text("no run nonsense")


def test_a_comparison_runs_with_progress_to_results(tab: Tab, model: Path) -> None:
    tab.open()
    tab.small(model, seed=11)
    tab.only_variants("BF16", "RTN 4-bit")
    tab.remember_progress()
    tab.run()
    expect(tab.find("#message-run")).to_contain_text("Started")
    tab.status("Finished")
    lines = tab.remembered_progress()
    assert any(re.fullmatch(r"(BF16|RTN 4-bit) · .*", line) for line in lines), lines
    expect(tab.find("#message-run")).to_have_text("")
    expect(tab.find("#progress")).to_contain_text("2 of 2 variants measured")
    expect(tab.find("#cancel")).to_be_hidden()
    for variant in ("bf16", "rtn:4"):
        row = tab.find(f'tbody[data-variant="{variant}"]')
        expect(row).to_have_attribute("data-state", "finished")
        expect(row.locator('td[data-key="perplexity"]')).to_have_text(re.compile(r"\d+\.\d\d"))


def test_results_are_those_of_the_store(tab: Tab, app: App, finished: str) -> None:
    tab.open(f"?run={finished}")
    for record in Store(app.home).run(finished).records:
        row = tab.find(f'tbody[data-variant="{record.variant}"]')
        for key, value in (
            ("perplexity", record.perplexity),
            ("kl", record.kl_divergence),
            ("size", record.size_bytes),
            ("bits", record.bits_per_weight),
        ):
            cell = row.locator(f'td[data-key="{key}"]')
            assert float(cell.get_attribute("data-value") or "nan") == value
    for name in FIGURES:
        figure = tab.find(f"#figure-{name}")
        expect(figure.locator(".js-plotly-plot .main-svg").first).to_be_visible()
    labels = tab.find("#figure-perplexity-size .textpoint text")
    expect(labels).to_have_count(3)
    assert sorted(labels.all_text_contents()) == ["BF16", "GPTQ 4-bit", "RTN 4-bit"]


def test_figures_hover_and_export(tab: Tab, finished: str) -> None:
    tab.open(f"?run={finished}")
    figure = tab.find("#figure-size .js-plotly-plot")
    expect(figure).to_be_visible()
    figure.scroll_into_view_if_needed()
    bar = figure.locator(".bars .point path").first
    bar.hover(force=True)
    expect(figure.locator(".hoverlayer .hovertext")).to_contain_text("BF16")
    for button, ending in (("Download plot", ".png"), ("SVG", ".svg")):
        with tab.page.expect_download() as download:
            figure.locator(f'.modebar-btn[data-title^="{button}"]').click(force=True)
        assert download.value.suggested_filename.endswith(ending)


def test_the_table_sorts_and_opens_rows(tab: Tab, finished: str) -> None:
    tab.open(f"?run={finished}")
    rows = tab.find("#results-table tbody")
    expect(rows).to_have_count(3)

    def sizes() -> list[float]:
        cells = tab.find('#results-table td[data-key="size"]')
        return [float(cell.get_attribute("data-value") or "nan") for cell in cells.all()]

    heading = tab.find('#results-table [data-sort="size"]')
    heading.press("Enter")
    assert sizes() == sorted(sizes())
    expect(tab.find('#results-table th[aria-sort="ascending"]')).to_have_count(1)
    heading.press("Enter")
    assert sizes() == sorted(sizes(), reverse=True)
    heading.press("Enter")
    names = [row.get_attribute("data-variant") for row in rows.all()]
    assert names == ["bf16", "rtn:4", "gptq:4"]
    details = tab.find('tbody[data-variant="gptq:4"]')
    details.get_by_role("button", name="Details of GPTQ 4-bit").press("Enter")
    expect(details.locator(".ql-details")).to_contain_text("Kernel")
    expect(details.locator(".ql-details")).to_contain_text("damp percent")


def test_outputs_stand_side_by_side(tab: Tab, app: App, finished: str) -> None:
    tab.open(f"?run={finished}")
    tab.show("Outputs")
    columns = tab.find(".ql-answers").last.locator(".ql-column")
    expect(columns).to_have_count(3)
    assert columns.first.get_attribute("data-variant") == "bf16"
    for record in Store(app.home).run(finished).records:
        column = tab.find(f'.ql-column[data-variant="{record.variant}"]').last
        (output,) = record.outputs
        shown = column.locator(".ql-answer").text_content() or ""
        marks = column.locator(".ql-first")
        if output.first_divergence is None:
            expect(marks).to_have_count(0)
            assert shown.strip() == output.text.strip()
        else:
            expect(marks).to_have_count(1)
            before = "".join(output.pieces[: output.first_divergence])
            assert shown.lstrip(" ").startswith(before.lstrip(" "))


def test_a_run_can_be_asked_more_and_streams(tab: Tab, app: App, finished: str) -> None:
    tab.open(f"?run={finished}")
    tab.show("Outputs")
    tab.find("#ask-button").click()
    expect(tab.find("#ask-message")).to_contain_text("Type a prompt first")
    hostile = "<img src=x onerror=\"document.title='gone'\"><script>document.title='gone'</script>"
    tab.find("#ask-prompt textarea").fill(f"{hostile}\nA lake is\nA sea is\nA pond is")
    tab.number("ask-tokens", 200)
    tab.page.evaluate(
        """() => {
            window.streamed = new Set();
            new MutationObserver(() => {
                const answer = document.querySelector(".ql-column-running .ql-answer");
                if (answer && answer.textContent.trim()) window.streamed.add(answer.textContent);
            }).observe(document.getElementById("answers"), { childList: true, subtree: true });
        }"""
    )
    tab.find("#ask-button").click()
    asked = tab.find(".ql-answers").filter(has_text="Asked later").first
    expect(asked.locator(".ql-prompt")).to_have_text(hostile)
    expect(asked.locator(".ql-column")).to_have_count(3)
    expect(tab.find("#ask-progress .ql-progress-line")).to_have_count(0)
    assert tab.page.evaluate("window.streamed.size") > 0
    expect(asked.locator(".ql-column-facts").first).to_contain_text("tokens")
    assert tab.page.title() == "QuantLab"
    assert tab.find(".ql-answers img").count() == 0
    assert tab.run_id() == finished


def test_exports_download(tab: Tab, app: App, finished: str, tmp_path: Path) -> None:
    tab.open(f"?run={finished}")
    tab.show("Runs")
    texts = {}
    for kind in ("json", "csv", "html"):
        with tab.page.expect_download() as download:
            tab.find(f"#export-{kind}").click()
        assert download.value.suggested_filename == f"quantlab-{finished}.{kind}"
        path = tmp_path / f"run.{kind}"
        download.value.save_as(path)
        texts[kind] = path.read_text(encoding="utf-8")
    records = Store(app.home).run(finished).records
    document = json.loads(texts["json"])
    assert [one["perplexity"] for one in document["results"]] == [r.perplexity for r in records]
    assert document["environment"]["cpu"]
    rows = list(csv.DictReader(texts["csv"].splitlines()))
    assert [float(row["kl_divergence"]) for row in rows] == [r.kl_divergence for r in records]
    assert "Plotly.newPlot" in texts["html"]


def test_the_reproducing_command_is_copied(tab: Tab, finished: str) -> None:
    tab.open(f"?run={finished}")
    tab.show("Runs")
    tab.page.get_by_role("button", name="Copy", exact=True).click()
    expect(tab.page.get_by_role("button", name="Copied")).to_be_visible()
    copied = tab.page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("python -m quantlab compare --model ")
    assert "--methods bf16,rtn:4,gptq:4 --group-size 32" in copied


def test_settings_of_a_run_come_back(tab: Tab, finished: str) -> None:
    tab.open(f"?run={finished}")
    tab.show("Runs")
    tab.find("#use-settings").click()
    expect(tab.find("#run")).to_be_visible()
    expect(tab.find(".ql-chip-name")).to_have_text(["BF16", "RTN 4-bit", "GPTQ 4-bit"])
    tab.section("advanced-section")
    expect(tab.find("#group-size input")).to_have_value("32")


def test_cancel_ends_the_run_in_view(tab: Tab, app: App, model: Path) -> None:
    tab.open()
    tab.small(model, prompts=40, seed=12)
    tab.only_variants("BF16", "RTN 4-bit")
    run_id = tab.run()
    expect(tab.find('tbody[data-variant="bf16"] .ql-pending')).to_contain_text("answering")
    expect(tab.find("#progress [role=progressbar]")).to_be_visible()
    expect(tab.find('tbody[data-variant="rtn:4"] .ql-pending')).to_have_text("waiting")
    tab.find("#cancel").click()  # The queue's own tests hold the two seconds.
    tab.status("Cancelled")
    assert Store(app.home).run_head(run_id).status == "cancelled"
    expect(tab.find('tbody[data-variant="rtn:4"]')).to_contain_text("cancelled")
    expect(tab.find("#cancel")).to_be_hidden()


def test_a_reload_finds_the_running_job_and_the_form_again(tab: Tab, model: Path) -> None:
    tab.open()
    tab.small(model, prompts=40, seed=13)
    tab.only_variants("BF16", "RTN 4-bit")
    run_id = tab.run()
    tab.page.reload()
    expect(tab.find("#cancel")).to_be_visible()
    assert tab.run_id() == run_id
    expect(tab.find(".ql-chip-name")).to_have_text(["BF16", "RTN 4-bit"])
    tab.section("advanced-section")
    expect(tab.find("#seed input")).to_have_value("13")
    other = tab.page.context.new_page()
    second = Tab(other, tab.app).open()  # Without an address, what runs comes into view.
    assert second.run_id() == run_id
    second.find("#cancel").click()
    second.status("Cancelled")
    tab.status("Cancelled")
    assert second.problems == []


def test_a_second_run_waits_and_says_so(tab: Tab, app: App, model: Path) -> None:
    tab.open()
    tab.small(model, prompts=40, seed=14)
    tab.only_variants("BF16", "RTN 4-bit")
    first = tab.run()
    tab.press_run()
    expect(tab.find("#message-run")).to_contain_text("already running")
    tab.number("seed", 15)
    tab.press_run()
    expect(tab.find("#message-run")).to_contain_text("Queued: it is number 1 in line")
    expect(tab.find("#queue")).to_contain_text("1 waiting")
    assert tab.run_id() == first
    tab.find("#queue").get_by_role("button", name="Show").click()
    tab.status("Waiting in line: 1 ahead")
    second = tab.run_id()
    assert second != first
    tab.find("#cancel").click()
    tab.status("Cancelled")
    tab.find("#queue").get_by_role("button", name="Show").click()
    tab.page.wait_for_url(f"**/?*run={first}*")
    assert Store(app.home).run_head(second).status == "cancelled"
    assert Store(app.home).run_head(first).status == "running"
    tab.find("#cancel").click()
    tab.status("Cancelled")


def test_a_failing_method_is_a_row_and_the_others_finish(
    tab: Tab, app: App, model: Path, tmp_path: Path
) -> None:
    """llama.cpp's Llama has no GELU, so a Llama with one stops GGUF, and only GGUF."""
    odd = shutil.copytree(model, tmp_path / "odd-llama")
    config = json.loads((odd / "config.json").read_text(encoding="utf-8"))
    (odd / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}), encoding="utf-8")
    tab.open()
    tab.small(odd, seed=16)
    tab.only_variants("BF16", "RTN 4-bit", "GGUF Q4_K_M")
    run_id = tab.run()
    tab.status("Finished")
    expect(tab.find("#progress")).to_contain_text("2 of 3 variants measured")
    order = [row.get_attribute("data-variant") for row in tab.find("#results-table tbody").all()]
    assert order == ["bf16", "rtn:4", "gguf:q4_k_m"]
    row = tab.find('tbody[data-variant="gguf:q4_k_m"]')
    expect(row).to_have_attribute("data-state", "failed")
    expect(row.locator(".ql-badge-failed")).to_be_visible()
    expect(row).to_contain_text("activation gelu")
    expect(tab.find("#figure-size .js-plotly-plot")).to_be_visible()
    tab.show("Outputs")
    expect(tab.find('.ql-column[data-variant="gguf:q4_k_m"]')).to_contain_text("activation gelu")
    record = Store(app.home).run(run_id).records[2]
    assert record.status == "failed"
    assert record.perplexity is None


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("model", "no such file or folder"),
        ("advanced", "group_size"),
        ("texts", "too few for"),
        ("texts-missing", "no such file"),
        ("variants", "damp_percent"),
        ("variants-none", "Add at least one variant"),
    ],
)
def test_bad_input_is_told_where_the_person_looks(
    tab: Tab, app: App, model: Path, tmp_path: Path, place: str, message: str
) -> None:
    tab.open()
    tab.small(model, seed=17)
    before = len(Store(app.home).runs(100))
    if place == "model":
        tab.choose_model("/no/such/model")
    elif place == "advanced":
        tab.number("group-size", 0)
    elif place == "texts":
        short = tmp_path / "short.txt"
        short.write_text("Too short.", encoding="utf-8")
        with tab.page.expect_file_chooser() as chooser:
            tab.find("#upload-evaluation").click()
        chooser.value.set_files(short)
        expect(tab.find("#evaluation input")).to_have_value(re.compile("short.txt"))
    elif place == "texts-missing":
        field = tab.find("#evaluation input")
        field.fill("/no/such/text.txt")
        field.press("Enter")
        field.blur()
    elif place == "variants":
        tab.find(
            "[data-options]",
        ).filter(has_text="GPTQ 4-bit").click()
        field = tab.find('[id$="-damp_percent"]')
        field.fill("99")
        field.blur()
        expect(tab.find(".ql-chip-changed")).to_have_count(1)
    elif place == "variants-none":
        tab.only_variants()
    tab.press_run()
    where = place.partition("-")[0]
    alert = tab.find(f"#message-{where} [role=alert]")
    expect(alert).to_contain_text(message)
    expect(alert).to_be_in_viewport()
    expect(tab.find("#form [role=alert]")).to_have_count(1)
    assert len(Store(app.home).runs(100)) == before


def test_options_of_a_variant_reach_its_run(tab: Tab, app: App, model: Path) -> None:
    tab.open()
    tab.small(model, seed=18)
    tab.only_variants("RTN 4-bit", "GPTQ 4-bit")
    tab.find("[data-options]").filter(has_text="GPTQ 4-bit").click()
    options = tab.find(".ql-options[open]")
    expect(options).to_have_count(1)
    options.get_by_label("Act-order").uncheck()
    expect(tab.find(".ql-chip-changed")).to_have_count(1)
    options.get_by_label("Damping", exact=True).fill("0.05")
    options.get_by_label("Damping", exact=True).blur()
    tab.only_variants("GPTQ 4-bit")  # The options move up, and stay what they are.
    options = tab.find(".ql-options[open]")
    expect(options.get_by_label("Damping", exact=True)).to_have_value("0.05")
    expect(options.get_by_label("Act-order")).not_to_be_checked()
    tab.find("#add-method input").click()
    tab.page.get_by_role("option", name="GGUF").click()
    tab.find("#add").click()
    expect(tab.find(".ql-chip-name")).to_have_text(["GPTQ 4-bit*", "GGUF Q4_K_M"])
    tab.only_variants("GPTQ 4-bit")
    tab.find("#stop-strings textarea").fill("e\n\\n\n s")
    tab.run()
    tab.status("Finished")
    run = Store(app.home).run(tab.run_id())
    assert [v.label for v in run.spec.variants] == ["gptq:4:act_order=false:damp_percent=0.05"]
    assert run.spec.stop_strings == ("e", "\n", " s")
    assert not [s for s in run.spec.stop_strings if s in run.records[0].outputs[0].text]


def test_a_run_is_opened_and_deleted_from_the_history(tab: Tab, app: App, finished: str) -> None:
    store = Store(app.home)
    victim = store.create_run(store.run(finished).spec)
    store.update_run(victim, status="cancelled")
    tab.open()
    tab.show("Runs")
    row = tab.find(f'[data-run-row="{finished}"]')
    row.get_by_role("button").press("Enter")
    expect(row.get_by_role("button")).to_have_attribute("aria-current", "true")
    assert tab.run_id() == finished
    expect(tab.find("#detail")).to_contain_text(finished)
    tab.find(f'[data-open="{victim}"]').click()
    expect(tab.find("#detail")).to_contain_text(victim)
    tab.find("#delete").click()
    tab.find("#delete-no").click()
    expect(tab.find("#delete-yes")).to_be_hidden()
    tab.find("#delete").click()
    tab.find("#delete-yes").click()
    expect(tab.find(f'[data-run-row="{victim}"]')).to_have_count(0)
    expect(tab.find("#runs-message")).to_contain_text("is deleted")
    assert victim not in {run.id for run in Store(app.home).runs(100)}


def test_japanese_by_the_switch_and_back(tab: Tab, finished: str) -> None:
    tab.open(f"?run={finished}")
    tab.only_variants("BF16", "AWQ 4-bit")
    tab.find("#language input").click()
    tab.page.get_by_role("option", name="日本語").click()
    expect(tab.find("#tabs").get_by_role("tab")).to_have_text(
        ["比較", "出力", "検査", "学ぶ", "アドバイザー", "履歴"]
    )
    expect(tab.find("#run")).to_have_text("比較を実行")
    expect(tab.find("#progress")).to_contain_text("測定")
    expect(tab.find("#figure-size .gtitle")).to_contain_text("ディスク上のサイズ")
    expect(tab.find(".ql-chip-name")).to_have_text(["BF16", "AWQ 4-bit"])  # The form is kept.
    assert tab.run_id() == finished
    tab.find("#language input").click()
    tab.page.get_by_role("option", name="English").click()
    expect(tab.find("#run")).to_have_text("Run comparison")


@pytest.mark.parametrize("width", [390, 900, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_sticks_out_and_all_is_reachable(
    chromium: Browser, app: App, finished: str, width: int, dark: bool
) -> None:
    context = chromium.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if dark else "light",
        locale="en-US",
    )
    tab = Tab(context.new_page(), app).open(f"?run={finished}")
    expect(tab.find("#figure-size .main-svg").first).to_be_visible()
    for name in ("Compare", "Outputs", "Inspect", "Advisor", "Runs"):
        tab.show(name)
        wide = tab.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, (name, wide)
    title = tab.find("#figure-size .gtitle")
    tab.show("Compare")
    colour = title.evaluate("node => getComputedStyle(node).fill")
    channels = [int(one) for one in re.findall(r"\d+", colour)[:3]]
    assert (sum(channels) / 3 > 128) is dark
    assert tab.problems == []
    context.close()


def test_the_form_works_by_keyboard_alone(tab: Tab) -> None:
    tab.open()
    tab.find("#model input").focus()
    reached = []
    for _ in range(40):
        tab.page.keyboard.press("Tab")
        reached.append(
            tab.page.evaluate(
                "document.activeElement.dataset.remove"
                " || document.activeElement.closest('[id]')?.id || ''"
            )
        )
        if reached[-1] == "run":
            break
    assert reached[-1] == "run"
    for section in ("options", "texts-section", "prompts-section", "advanced-section"):
        assert section in reached
    assert sum(len(one) == 8 for one in reached) >= 6  # The × of each chip.
