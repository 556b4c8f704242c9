"""The page without a browser: form to spec, errors to their places, runs to what is shown."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from quantlab import precomputed
from quantlab.cli.options import DEFAULT_METHODS
from quantlab.errors import ConfigError, JobError, MethodError, ModelError, QuantLabError, TextError
from quantlab.jobs import JobQueue
from quantlab.methods import METHODS, parse_variants
from quantlab.plots.words import words
from quantlab.store import Store
from quantlab.types import RunSpec, VariantSpec
from quantlab.ui import actions, form, options, painter, runs, server, services, variants, views
from quantlab.ui.client import Client
from quantlab.ui.messages import error_message
from quantlab.ui.shared import WANTED
from tests.records import failed, record

ROOT = Path(__file__).resolve().parents[1]
SAY = words("en")
ENGLISH = Client()

# The form


def test_one_click_is_the_default_comparison_of_the_command_line() -> None:
    spec = form.spec_of(form.defaults(), SAY)
    assert spec == RunSpec(variants=parse_variants(DEFAULT_METHODS), prompts=form.PROMPTS)


def test_a_spec_survives_the_form() -> None:
    spec = RunSpec(
        model="a/model",
        variants=parse_variants("bf16,gptq:3:act_order=false,gguf:q8_0"),
        group_size=128,
        calibration="self",
        text="/a/file.txt",
        prompts=("one", "two"),
        stop_strings=("\n\n", " the end ", "a\\n", "\\"),
        threads=2,
        seed=5,
        device="cpu",
        allow_pickle=True,
    )
    values = form.values_of(spec)
    back = form.spec_of(values, SAY)
    kept = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    assert {name: getattr(back, name) for name in kept} == kept


def test_prompts_are_lines() -> None:
    assert form.lines(" one \n\n two\n") == ("one", "two")
    assert form.lines(None) == ()


def test_stop_strings_are_lines_with_line_breaks_written() -> None:
    assert form.unescaped("\\n\n\n END\n\\\\n\n\\t") == ("\n", " END", "\\n", "\\t")
    assert form.unescaped(None) == form.unescaped("") == ()


@given(st.lists(st.text("a \\n\n", min_size=1), max_size=4))
def test_every_stop_string_has_its_line(strings: list[str]) -> None:
    assert form.unescaped("\n".join(map(form.escaped, strings))) == tuple(strings)


@pytest.mark.parametrize("value", [None, 1.5, "8", True])
def test_a_number_that_is_none_names_its_field(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^eval_tokens: Evaluation tokens"):
        form.spec_of(form.defaults() | {"eval_tokens": value}, SAY)


def test_no_variant_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one variant"):
        form.spec_of(form.defaults() | {"variants": []}, SAY)


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (ModelError("model: no such file"), "model"),
        (TextError("evaluation text: too short"), "texts"),
        (ConfigError("methods: gptq:4 is named twice"), "variants"),
        (ConfigError("gptq:4: damp_percent=99: needs at most 10"), "variants"),
        (ConfigError("gptq:4: group_size=0: needs at least 8"), "advanced"),
        (ConfigError("gptq:4:group_size=0: group_size=0: needs at least 8"), "variants"),
        (ConfigError("group_size: 0; needs at least 1"), "advanced"),
        (ConfigError("eval_tokens: 4 is less than one window (8)"), "texts"),
        (ConfigError("window: 900 is more than the model's context"), "texts"),
        (ConfigError("max_new_tokens: 0; needs at least 1"), "prompts"),
        (ConfigError("stop: empty; give the text"), "prompts"),
        (ConfigError("device: cuda was asked for"), "advanced"),
        (ConfigError("something else"), "run"),
        (JobError("the queue is gone"), "run"),
        (MethodError("broken"), "run"),
    ],
)
def test_errors_stand_beside_their_controls(error: QuantLabError, place: str) -> None:
    assert form.place_of(error) == place


def test_an_error_is_shown_once_and_opens_its_section() -> None:
    shown = actions.placed(TextError("evaluation text: too short", "a longer one"), ENGLISH)
    messages, sections = shown[: len(form.PLACES)], shown[len(form.PLACES) :]
    told = [text for text in messages if text]
    assert len(told) == 1
    assert messages[form.PLACES.index("texts")] == told[0]
    assert 'role="alert"' in told[0]
    assert "a longer one" in told[0]
    assert sections[0].open is True


def test_messages_escape_and_point_to_the_switch() -> None:
    html = error_message(ModelError("model: <b>x</b> needs --allow-pickle"), "en")
    assert "&lt;b&gt;" in html
    assert "Advanced" in html


@pytest.mark.parametrize(
    "saved",
    [None, 3, [], {"group_size": "big"}, {"variants": [{"x": 1}]}, {"variants": "bf16"}, {"x": 1}],
)
def test_a_form_that_cannot_be_restored_is_the_default(saved: object) -> None:
    values, expected = form.restored(saved), form.defaults()
    for one in (values, expected):
        one["variants"] = [variant["method"] for variant in one["variants"]]
    assert values == expected


def test_a_form_is_restored() -> None:
    saved = form.defaults() | {"model": "gpt2", "seed": 9, "prompts": "Hm?"}
    saved["variants"] = saved["variants"][:2]
    assert form.restored(json.loads(json.dumps(saved))) == saved


# Variants and their options


def chips(*names: str) -> list[dict[str, Any]]:
    return variants.write([variants.chip(one) for one in parse_variants(",".join(names))])


def test_every_method_can_be_added_with_its_default() -> None:
    data: list[dict[str, Any]] = []
    for name in METHODS:
        choices = variants.kind_choices(name)
        kind = variants.default_kind(name)
        assert (kind is None) is (not choices)
        data = variants.add(data, name, kind, SAY)
    assert [item["method"] for item in data] == list(METHODS)


def test_twins_are_refused() -> None:
    with pytest.raises(ConfigError, match="GPTQ 4-bit is already in the list"):
        variants.add(chips("gptq:4"), "gptq", "4", SAY)


def test_the_kind_of_the_method_before_counts_as_none() -> None:
    """Add was pressed before the browser knew what kinds the method chosen last has."""
    (added,) = variants.add([], "gguf", "4", SAY)
    assert added == variants.add([], "gguf", "q4_k_m", SAY)[0] | {"uid": added["uid"]}
    (added,) = variants.add([], "smoothquant", "q4_k_m", SAY)
    assert (added["method"], added["bits"]) == ("smoothquant", 8)
    with pytest.raises(ConfigError, match="17"):
        variants.add([], "gptq", "17", SAY)


def test_an_option_changes_one_variant_and_can_be_undone() -> None:
    data = chips("gptq:4", "gptq:3")
    uid = data[0]["uid"]
    changed = variants.set_option(data, uid, "act_order", False)
    assert changed[0]["options"] == {"act_order": False}
    assert changed[1] == data[1]
    assert variants.set_option(changed, uid, "act_order", True) == data
    assert variants.reset_options(changed, uid) == data


def test_options_take_the_type_of_their_default() -> None:
    data = chips("gptq:4")
    uid = data[0]["uid"]
    data = variants.set_option(data, uid, "damp_percent", "0.05")
    data = variants.set_option(data, uid, "group_size", " 128 ")
    assert data[0]["options"] == {"damp_percent": 0.05, "group_size": 128}
    assert variants.specs(data, 64)[0].label == "gptq:4:damp_percent=0.05:group_size=128"
    assert variants.set_option(data, uid, "group_size", "")[0]["options"] == {"damp_percent": 0.05}


def test_a_wrong_option_is_refused_by_name() -> None:
    data = chips("gptq:4")
    data = variants.set_option(data, data[0]["uid"], "damp_percent", "much")
    with pytest.raises(ConfigError, match="damp_percent"):
        variants.specs(data, 64)


def test_unknown_options_and_variants_are_ignored() -> None:
    data = chips("gptq:4")
    assert variants.set_option(data, data[0]["uid"], "nonsense", 1) == data
    assert variants.set_option(data, "nobody", "act_order", False) == data


def test_a_gguf_type_stays_when_options_are_reset() -> None:
    data = chips("gguf:q8_0")
    assert variants.reset_options(data, data[0]["uid"]) == data


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_accordion_of_a_method_has_every_option(language: str) -> None:
    for name in METHODS:
        kind = variants.default_kind(name)
        data = chips(f"{name}:{kind}" if kind else name)
        html = options.options_html(data, Client(language))
        for field in dataclasses.fields(METHODS[name].Config):
            shown = f'data-option="{field.name}"' in html
            assert shown is (field.name not in variants.IDENTITY), (name, field.name)


def test_translated_options_exist() -> None:
    """A translation of an option that no method has any more is left over."""
    real = {
        f"{prefix}{field.name}"
        for name, method in METHODS.items()
        for field in dataclasses.fields(method.Config)
        for prefix in ("", f"{name}.")
    }
    assert options.translated("ja").keys() <= real


def test_chips_show_changes_and_escape() -> None:
    data = chips("gptq:4", "bf16")
    data = variants.set_option(data, data[0]["uid"], "act_order", False)
    html = variants.chips_html(data, "en")
    assert html.count("ql-chip-changed") == 1
    assert html.count("data-remove") == 2
    assert html.count("data-options") == 1  # BF16 has none.


# Runs in view


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[services.Services]:
    """Services on an empty store; the queue is not started, so nothing is worked on."""
    store = Store(tmp_path / "home")
    made = services.Services(store, JobQueue(store, title=services.title))
    monkeypatch.setattr(services, "_services", made)
    monkeypatch.setattr(painter, "environment", lambda: {"cpu": "a <b>chip</b>", "threads": 2})
    yield made
    store.close()


def spec(*names: str, **changes: Any) -> RunSpec:
    return RunSpec(variants=parse_variants(",".join(names)), prompts=("Why?",), **changes)


def finished_run(at: services.Services, **changes: Any) -> str:
    run_id = at.store.create_run(spec("bf16", "gptq:4", "rtn:4", **changes))
    at.store.update_run(run_id, status="running", environment={"cpu": "then"})
    at.store.add_record(run_id, record("bf16"))
    at.store.add_record(run_id, record("gptq:4", kl=0.05))
    at.store.add_record(run_id, failed("rtn:4", "<i>no</i>"))
    at.store.update_run(run_id, status="finished")
    return run_id


def test_an_empty_home_shows_the_precomputed_comparison_marked(at: services.Services) -> None:
    changed = painter.paint(ENGLISH, "", {}).changed
    run = precomputed.run()
    assert changed["table"].count('data-state="finished"') == len(run.records) == 6
    for row in changed["table"].split("<tbody")[1:]:
        assert row.count("ql-badge-precomputed") == 1
    for piece in ("header", "progress", "answers_intro", "runs", "detail"):
        assert "ql-badge-precomputed" in changed[piece], piece
    for piece in ("progress", "answers_intro", "detail"):
        assert run.environment["cpu"] in changed[piece]
        assert run.environment["date"][:10] in changed[piece]
    assert f"precomputed · {run.environment['date'][:10]}" in changed["verdict"]
    for name in ("perplexity_size", "kl_bits", "speed", "size"):
        assert "precomputed" in changed[f"figure_{name}"].plot
    assert "a &lt;b&gt;chip&lt;/b&gt;" in changed["header"]
    assert 'data-run=""' in changed["header"], "the address names no run"
    assert changed["exports"].visible is changed["delete"].visible is False


def test_the_precomputed_comparison_never_enters_the_history(at: services.Services) -> None:
    painter.paint(ENGLISH, "", {})
    values, _ = runs.settings(ENGLISH, "")
    assert values is not None
    assert form.spec_of(values, SAY) == precomputed.run().spec
    assert at.store.runs(10) == []
    assert at.history() == ()
    with at.store.database.transaction(write=False) as db:
        (count,) = db.execute("SELECT count(*) FROM results").fetchone()
    assert count == 0
    own = finished_run(at)
    at.history(fresh=True)
    shown = painter.paint(ENGLISH, own, {}).changed
    assert "ql-badge-precomputed" not in "".join(
        shown[piece] for piece in ("header", "progress", "table", "verdict", "detail", "answers")
    )
    assert "precomputed" not in shown["figure_size"].plot
    rows = shown["runs"].split("data-run-row=")
    assert [row.split('"')[1] for row in rows[1:]] == [own, "precomputed"]
    assert shown["exports"].visible is shown["delete"].visible is True


def test_the_first_sight_is_the_table_without_what_can_wait(at: services.Services) -> None:
    first = painter.paint(ENGLISH, "", {}, first=True)
    assert {"header", "progress", "table", "verdict"} <= set(first.changed)
    assert not any(name.startswith("figure") or name == "tokens" for name in first.changed)
    rest = painter.paint(ENGLISH, "", first.marks).changed
    assert not set(rest) & set(first.changed)
    assert "figure_speed" in rest


def test_paired_tokens_are_drawn_only_for_those_who_open_them(at: services.Services) -> None:
    closed = painter.paint(ENGLISH, "", {})
    assert "tokens" not in closed.changed
    opened = painter.paint(ENGLISH, "", {**closed.marks, WANTED: "yes"})
    assert set(opened.changed) == {"tokens"}


def test_a_finished_run_fills_the_page(at: services.Services) -> None:
    run_id = finished_run(at)
    changed = painter.paint(ENGLISH, run_id, {}).changed
    assert "2 of 3 variants measured" in changed["progress"]
    assert "&lt;i&gt;no&lt;/i&gt;" in changed["table"]
    assert "higher perplexity" not in changed["verdict"]
    assert run_id in changed["header"]
    assert "python -m quantlab compare" in changed["detail"]
    for name in ("perplexity_size", "kl_bits", "speed", "size"):
        assert changed[f"figure_{name}"].type == "plotly"
    assert "figure_training" not in changed, "nothing was trained"
    assert changed["training"].visible is False


def test_only_what_has_changed_is_painted_again(at: services.Services) -> None:
    run_id = finished_run(at)
    first = painter.paint(ENGLISH, run_id, {})
    assert painter.paint(ENGLISH, run_id, first.marks).changed == {}
    dark = painter.paint(Client("en", True), run_id, first.marks).changed
    assert set(dark) == {
        f"figure_{name}" for name in ("perplexity_size", "kl_bits", "speed", "size")
    }
    japanese = painter.paint(Client("ja"), run_id, first.marks).changed
    assert "測定" in japanese["progress"]


def test_a_queued_run_says_how_many_are_ahead(at: services.Services) -> None:
    at.queue.submit(spec("bf16"))
    second = at.queue.submit(spec("rtn:4"))
    changed = painter.paint(ENGLISH, second, {}).changed
    assert changed["cancel"].visible is True
    assert changed["timer"].value == painter.FAST
    assert "2 waiting" in changed["queue"]
    assert changed["queue"].count("data-show") == 1


def test_a_deleted_run_leaves_the_precomputed_one(at: services.Services) -> None:
    run_id = finished_run(at)
    at.store.delete_run(run_id)
    painting = painter.paint(ENGLISH, run_id, {})
    assert painting.marks == painter.paint(ENGLISH, "", {}).marks
    assert 'aria-current="true"' in painting.changed["runs"]


def test_a_broken_store_is_told_where_progress_stands(
    at: services.Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ModelError("the disk is <full>")

    monkeypatch.setattr(at.queue, "view", broken)
    changed = painter.paint(ENGLISH, finished_run(at), {}).changed
    assert "the disk is &lt;full&gt;" in changed["progress"]


def test_a_fresh_page_finds_its_run(at: services.Services) -> None:
    assert at.first_in_view("") == ""
    old = finished_run(at)
    new = finished_run(at, seed=1)
    assert at.first_in_view("") == new
    assert at.first_in_view(old) == old
    assert at.first_in_view("nonsense") == new
    queued = at.queue.submit(spec("bf16"))
    assert at.first_in_view("") == queued
    assert at.first_in_view(old) == old


def test_answers_belong_to_their_comparison(at: services.Services) -> None:
    parent = finished_run(at)
    answer = at.queue.submit(
        dataclasses.replace(at.store.run(parent).spec, variants=(), prompts=("<u>And?</u>",)),
        kind="answer",
        parent=parent,
    )
    assert at.comparison_of(answer) == parent
    assert at.first_in_view(answer) == parent
    assert at.answers_to(parent) == [answer]
    changed = painter.paint(ENGLISH, parent, {}).changed
    html = changed["answers"]
    assert html.index("&lt;u&gt;And?&lt;/u&gt;") < html.index("Why?")
    assert changed["ask_cancel"].visible is True


def test_run_queues_once_and_says_so(
    at: services.Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions.pipeline, "validate", lambda spec: None)
    values = form.defaults()
    first = actions.start(ENGLISH, "", actions.Pressed(), *(values[name] for name in form.FIELDS))
    again = actions.start(
        ENGLISH, first[0], actions.Pressed(), *(values[name] for name in form.FIELDS)
    )
    assert again[0] == first[0]
    assert "already" in again[1 + form.PLACES.index("run")]
    other = values | {"seed": 1}
    pressed = actions.Pressed()
    queued = actions.start(ENGLISH, first[0], pressed, *(other[name] for name in form.FIELDS))
    assert "Queued" in queued[1 + form.PLACES.index("run")]
    assert len(at.queue.waiting()) == 2
    # The message goes when it is no longer true, once.
    assert not pressed.outdated()
    at.queue.cancel(at.queue.waiting()[1])
    assert pressed.outdated()
    assert not pressed.outdated()


def test_bad_input_queues_nothing(at: services.Services) -> None:
    values = form.defaults() | {"model": "/no/such/folder"}
    refused = actions.Pressed()
    told = actions.start(ENGLISH, "", refused, *(values[name] for name in form.FIELDS))
    place = form.PLACES.index("model")
    assert "no such file or folder" in told[1 + place]
    assert at.queue.waiting() == []
    # A look at the same form that ends after Run was pressed leaves the message where it is.
    looked = actions.look(ENGLISH, refused, *(values[name] for name in form.FIELDS))
    assert looked[2 + place] == told[1 + place]
    changed = values | {"model": "bundled"}
    looked = actions.look(ENGLISH, refused, *(changed[name] for name in form.FIELDS))
    assert looked[2 + place] == ""


def test_an_upload_outlives_its_temporary_file(at: services.Services, tmp_path: Path) -> None:
    source = tmp_path / "mine.txt"
    source.write_text("some text", encoding="utf-8")
    kept = Path(actions.uploaded(str(source)))
    source.unlink()
    assert kept.read_text(encoding="utf-8") == "some text"
    assert at.store.root in kept.parents


@pytest.mark.parametrize("kind", runs.FORMATS)
def test_downloads_are_named_after_their_run(at: services.Services, kind: str) -> None:
    run_id = finished_run(at)
    path = Path(runs.write(ENGLISH, run_id, kind))
    assert path.name == f"quantlab-{run_id}.{kind}"
    assert "gptq" in path.read_text(encoding="utf-8")


def test_settings_of_a_run_return_to_the_form(at: services.Services) -> None:
    run_id = finished_run(at, seed=4, group_size=32)
    values, _ = runs.settings(ENGLISH, run_id)
    assert values is not None
    assert form.spec_of(values, SAY) == at.store.run(run_id).spec


def test_models_are_named_briefly() -> None:
    assert views.model_name("/a/long/path/tiny") == "tiny"
    assert views.model_name("owner/name") == "owner/name"
    assert views.model_name("bundled") == "bundled"


def test_stages_before_the_first_variant_are_told() -> None:
    told = views.preparing("original · reference · 3/8", words("en"))
    assert told == "original · reading the evaluation text · 3/8"


# The server


def test_a_cookie_chooses_the_language_before_gradio_does() -> None:
    page = "<!doctype html><html><head><script>gradio</script></head></html>"
    application = Starlette(
        routes=[
            Route("/", lambda request: PlainTextResponse(page, media_type="text/html")),
            Route("/other", lambda request: PlainTextResponse(page)),
        ],
        middleware=[Middleware(server.ChosenLanguage)],
    )
    client = TestClient(application)
    answer = client.get("/")
    assert answer.text.index("quantlab_language") < answer.text.index("gradio")
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert client.get("/other").text == page


def test_the_page_is_for_this_machine_only_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    monkeypatch.delenv("GRADIO_SERVER_PORT", raising=False)
    assert server.arguments([]).host == "127.0.0.1"
    assert server.arguments(["--host", "0.0.0.0", "--port", "7999"]).host == "0.0.0.0"
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    assert server.arguments([]).host == "0.0.0.0"


def test_fonts_come_from_the_system() -> None:
    style = server.theme()._get_theme_css()
    assert "url(http" not in style.replace('"', "")
    assert "googleapis" not in style
    assert "@font-face" not in style


def test_importing_the_app_starts_nothing(tmp_path: Path) -> None:
    code = (
        "import app, threading, gradio\n"
        "assert isinstance(app.demo, gradio.Blocks)\n"
        "from quantlab.ui import services\n"
        "assert services._services is None\n"
        "names = {t.name for t in threading.enumerate()}\n"
        "assert not any('supervisor' in name for name in names), names\n"
    )
    home = tmp_path / "home"
    environment = os.environ | {"QUANTLAB_HOME": str(home), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=120)
    assert not home.exists()


def test_variant_spec_labels_are_titles() -> None:
    assert services.title(VariantSpec("gptq", 4)) == "GPTQ 4-bit"
