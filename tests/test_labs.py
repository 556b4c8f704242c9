"""The calibration lab: its plan, its runs in the queue, its cells, and their matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantlab import estimate, labs, pipeline
from quantlab.errors import ConfigError, QuantLabError, TextError
from quantlab.jobs import JobQueue
from quantlab.methods import parse_variants
from quantlab.plots import lab
from quantlab.plots.words import words
from quantlab.results import ResultRecord
from quantlab.store import Store
from quantlab.types import RunSpec
from quantlab.ui import calibration_lab, painter, services
from quantlab.ui.client import Client
from tests.records import SEGMENTS, failed, record

ENGLISH = Client()
SAY = words("en")
HOSTILE = "<img src=x onerror=alert(1)>"
PLAN = labs.Plan(
    RunSpec(model="m", variants=parse_variants("gptq:4,awq:4")), ("project", "self"), ("a", "b")
)


def test_the_estimate_is_the_sum_of_what_is_left_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calibration texts by three evaluation texts, by hand, at 10^11 operations a second."""
    monkeypatch.setattr(estimate, "matmul_rate", lambda dtype: 1e11)
    monkeypatch.setattr(estimate, "fast_bfloat16", lambda: False)
    monkeypatch.setattr(estimate, "parameter_count", lambda model: 134_515_008)
    spec = RunSpec(
        variants=parse_variants("rtn:4,gptq:4"), eval_tokens=1000, calibration_tokens=2000
    )
    plan = labs.Plan(spec, ("project", "self"), ("project", "wikitext2", "c4"))
    forward = 2 * 134_515_008
    reading = forward * 1000 / (0.22 * 1e11)  # once by the original, once by each variant
    comparison = reading + 2 * (4.0 + reading)
    # Rounding takes nothing; GPTQ one pass with its sums of products, and its search.
    passing = forward * 2000 / (0.42 * 1e11) + 0.1 * forward * 2000 / (0.22 * 1e11)
    found = labs.cost(plan, pipeline.estimate)
    assert found.seconds == pytest.approx(6 * comparison + 2 * (passing + 16.0), rel=1e-12)
    assert found.peak_bytes == pipeline.estimate(spec).peak_bytes
    # The form says the same, rounded to seconds, before anything is queued.
    minutes, seconds = divmod(round(found.seconds), 60)
    form = ["bundled", ["rtn:4", "gptq:4"], [*plan.calibrations], [*plan.evaluations]]
    counts = [2000, spec.calibration_length, 1000, spec.window, spec.group_size]
    assert f"<strong>{minutes}:{seconds:02d}</strong>" in calibration_lab._look(
        ENGLISH, *form, *counts
    )
    for wrong in ([form[0], None, *form[2:], *counts], [*form, None, *counts[1:]]):
        assert SAY("estimate_unknown") in calibration_lab._look(ENGLISH, *wrong)
    monkeypatch.setattr(estimate, "parameter_count", lambda model: None)
    assert "unknown until" in calibration_lab._look(ENGLISH, *form, *counts)


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[services.Services]:
    """Services on a store of their own; the queue is not started."""
    store = Store(tmp_path / "home")
    made = services.Services(store, JobQueue(store, title=services.title))
    monkeypatch.setattr(services, "_services", made)
    monkeypatch.setattr(painter, "environment", lambda: {"cpu": "a chip", "threads": 2})
    yield made
    store.close()


def cells_of(at: services.Services) -> dict[tuple[str, str, str], labs.Cell]:
    known = labs.latest(at.store)
    assert known is not None
    found = labs.cells(known.plan, [at.queue.view(run) for run in known.runs])
    return {(one.variant, one.calibration, one.evaluation): one for one in found}


def test_every_pair_of_texts_is_one_comparison_of_all_methods() -> None:
    specs = list(PLAN.specs())
    assert [(spec.calibration, spec.text) for spec in specs] == [
        ("project", "a"),
        ("project", "b"),
        ("self", "a"),
        ("self", "b"),
    ]
    for spec in specs:
        standard = dataclasses.replace(spec, calibration="project", text="project")
        assert standard == dataclasses.replace(PLAN.spec, calibration="project", text="project")
    assert labs.Plan.from_json(PLAN.to_json()) == PLAN


def test_a_lab_is_found_again_and_its_cells_fill(at: services.Services) -> None:
    assert labs.latest(at.store) is None
    lab_id = labs.submit(at.store, at.queue, PLAN)
    again = labs.latest(Store(at.store.root))
    assert again is not None
    assert (again.id, again.plan) == (lab_id, PLAN)
    assert list(again.runs) == at.queue.waiting()
    assert {cell.state for cell in cells_of(at).values()} == {"waiting"}
    first = again.runs[0]
    at.store.update_run(first, status="running")
    before = labs.mark(at.store)
    assert labs.mark(at.store) == before
    at.store.add_record(first, record("gptq:4", kl=0.125))
    assert labs.mark(at.store) != before
    filled = cells_of(at)
    done = filled["gptq:4", "project", "a"]
    assert (done.state, done.reason) == ("finished", None)
    assert done.record is not None
    assert done.record.kl_divergence == 0.125
    assert len(filled) == 2 * 2 * 2
    at.store.add_record(first, failed("awq:4", "it broke", "mend it"))
    at.store.update_run(first, status="finished")
    at.store.update_run(again.runs[1], status="failed", error="the text is too short")
    filled = cells_of(at)
    assert filled["awq:4", "project", "a"].reason == "it broke (mend it)"
    for name in ("gptq:4", "awq:4"):
        cell = filled[name, "project", "b"]
        assert (cell.state, cell.reason) == ("failed", "the text is too short")
    at.store.delete_run(first)
    assert cells_of(at)["gptq:4", "project", "a"].state == "missing"


def test_the_newest_lab_counts_and_shares_what_is_queued(at: services.Services) -> None:
    labs.submit(at.store, at.queue, PLAN)
    queued = at.queue.waiting()
    smaller = dataclasses.replace(PLAN, calibrations=("self",))
    lab_id = labs.submit(at.store, at.queue, smaller)
    known = labs.latest(at.store)
    assert known is not None
    assert known.id == lab_id
    assert list(known.runs) == queued[2:]
    assert at.queue.waiting() == queued


def test_nothing_is_queued_by_halves(
    at: services.Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    submit = at.queue.submit

    def third_fails(*given: object, **named: object) -> str:
        calls.append(given)
        if len(calls) == 3:
            raise QuantLabError("no more")
        return submit(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(at.queue, "submit", third_fails)
    with pytest.raises(QuantLabError, match="no more"):
        labs.submit(at.store, at.queue, PLAN)
    assert at.queue.waiting() == []
    assert labs.latest(at.store) is None


def test_a_lab_does_not_take_the_page_over(at: services.Services) -> None:
    comparison = at.store.create_run(RunSpec(variants=parse_variants("bf16")))
    at.store.update_run(comparison, status="finished")
    labs.submit(at.store, at.queue, PLAN)
    assert at.first_in_view("") == comparison
    known = labs.latest(at.store)
    assert known is not None
    at.store.update_run(known.runs[0], status="running")
    assert at.first_in_view("") == comparison
    assert at.first_in_view(known.runs[0]) == known.runs[0], "one that is asked for is shown"


def form(**changes: object) -> list[object]:
    """What the form hands over, a small lab of the bundled model unless changed."""
    values = {
        "model": "bundled",
        "methods": ["gptq:4"],
        "calibrations": ["project"],
        "evaluations": ["project"],
    } | dict.fromkeys(calibration_lab.NUMBERS, 512)
    assert changes.keys() <= values.keys()
    return list((values | changes).values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": []}, "at least one variant"),
        ({"methods": [f"{HOSTILE}:4"]}, "&lt;img"),
        ({"calibrations": []}, "at least one calibration text"),
        ({"evaluations": []}, "at least one evaluation text"),
        ({"calibrations": [f"{n}.txt" for n in range(25)]}, "25 pairs of texts"),
        ({"evaluations": ["/no/such.txt"]}, "no such file"),
        ({"eval_tokens": 100}, "less than one window"),
        ({"window": None}, "window"),
    ],
)
def test_what_cannot_work_is_one_message_and_no_job(
    at: services.Services, changes: dict[str, object], says: str
) -> None:
    shown = calibration_lab._start(ENGLISH, *form(**changes))  # type: ignore[arg-type]
    assert says in shown
    assert shown.count("<p") == 1 + shown.count("ql-hint")
    assert 'role="alert"' in shown
    assert "<img" not in shown
    assert at.queue.waiting() == []
    assert labs.latest(at.store) is None


def test_the_form_queues_its_matrix_and_cancel_empties_it(
    at: services.Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "validate", lambda spec: None)
    shown = calibration_lab._start(
        ENGLISH,
        *form(methods=["gptq:4", "awq:4"], calibrations=["project", "self", "project"]),  # type: ignore[arg-type]
    )
    assert "4 cells in 2 comparisons" in shown
    specs = [at.store.run(run).spec for run in at.queue.waiting()]
    assert [spec.calibration for spec in specs] == ["project", "self"]
    assert {(spec.window, spec.group_size, spec.prompts) for spec in specs} == {(512, 512, ())}
    calibration_lab._cancel()
    assert at.queue.waiting() == []
    assert {cell.state for cell in cells_of(at).values()} == {"cancelled"}


def test_a_pasted_text_becomes_a_file_of_the_store(at: services.Services) -> None:
    chosen, note = calibration_lab._paste("Viele Grüße, 世界", ["project"])
    path = Path(chosen[1])
    assert (chosen[0], note) == ("project", "")
    assert path.read_text(encoding="utf-8") == "Viele Grüße, 世界"
    assert path.is_relative_to(at.store.root)
    again, _ = calibration_lab._paste("Viele Grüße, 世界", chosen)
    assert again == chosen
    with pytest.raises(TextError, match="too few"):
        labs.check(
            dataclasses.replace(
                PLAN, spec=RunSpec(variants=parse_variants("rtn:4")), evaluations=(str(path),)
            ),
            pipeline.validate,
        )
    with pytest.raises(ConfigError):
        labs.check(dataclasses.replace(PLAN, evaluations=()), pipeline.validate)


# The picture


def swinging(variant: str, mean: float, swing: float) -> ResultRecord:
    values = [mean + swing * (-1) ** index for index in range(SEGMENTS)]
    return record(variant, kl=mean, segments={"nll": values, "kl": values})


def cell(
    calibration: str, found: ResultRecord | None, text: str = "a", **more: object
) -> labs.Cell:
    state = "finished" if found else "failed"
    values = {"state": state, "record": found} | more
    return labs.Cell("gptq:4", calibration, text, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("dark", [False, True])
def test_the_heatmap_has_the_numbers_in_its_cells(dark: bool) -> None:
    cells = [
        cell("project", record("gptq:4", kl=0.05, perplexity=21.5, perplexity_ci=(20.5, 22.5))),
        cell("project", record("gptq:4", kl=0.3), "b"),
        cell(HOSTILE, None, reason=HOSTILE),
        cell(HOSTILE, None, "b", state="waiting"),
    ]
    drawn = lab.figure(cells, dark)
    (heat,) = drawn.data
    assert [list(row) for row in heat.z] == [[0.05, 0.3], [None, None]]
    assert heat.text[0][0] == "<b>0.0500 ± 0.0050</b><br>ppl 21.50 ± 1.00"
    assert [note.text for note in drawn.layout.annotations] == ["⚠ failed", "… waiting"]
    assert [(note.x, note.y) for note in drawn.layout.annotations] == [(0, 1), (1, 1)]
    assert drawn.layout.yaxis.ticktext[0] == "GPTQ 4-bit<br>project"
    assert list(drawn.layout.xaxis.ticktext) == ["a", "b"]
    # As lists, because `to_json` writes every "<" as an escape sequence of its own.
    texts = [
        *drawn.layout.yaxis.ticktext,
        *heat.hovertext[1],
        *(n.hovertext for n in drawn.layout.annotations),
    ]
    assert sum("&lt;img" in text for text in texts) == 1 + 2 + 2
    assert not any("<img" in text for text in texts)


def test_the_colours_keep_the_ink_readable() -> None:
    """At least 4.5 to 1 on both ends of the scale (WCAG 2.2, relative luminance)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for dark, ends in lab.SHADES.items():
        ink = luminance(lab.palette.INK[dark])
        for end in ends:
            high, low = sorted((ink, luminance(end)), reverse=True)
            assert (high + 0.05) / (low + 0.05) > 4.5, (dark, end)


def test_sentences_hold_each_calibration_against_the_best() -> None:
    cells = [
        cell("project", swinging("gptq:4", 0.10, 0.01)),
        cell("self", swinging("gptq:4", 0.14, 0.03)),
        cell("mine.txt", swinging("gptq:4", 0.1005, 0.02)),
        cell("project", swinging("gptq:4", 0.2, 0.01), "b"),
        cell("broken", None),
    ]
    worse, same = lab.sentences(cells)
    # The two swing together, so their difference swings by 0.02 and by 0.01.
    half = 1.96 * 0.02 / math.sqrt(SEGMENTS)
    assert worse.startswith("GPTQ 4-bit, evaluated on a: calibrated on self it is worse")
    assert "calibrated on project by 0.0400 ±" in worse
    assert float(worse.split("± ")[1].split()[0]) == pytest.approx(half, rel=0.1)
    assert "calibrated on mine.txt or on project is indistinguishable" in same
    page = lab.notes([*cells, cell(HOSTILE, None, reason=HOSTILE)])
    assert page.count("<li>") == 2 + 2
    assert "<img" not in page
    assert len(lab.sentences(cells, "ja")) == 2
    assert lab.notes([]) == ""


def test_the_page_shows_the_newest_lab_and_draws_it_only_anew(at: services.Services) -> None:
    nothing = painter.paint(ENGLISH, "", {}).changed
    assert nothing["lab_column"].visible is False
    assert "lab_figure" not in nothing
    labs.submit(at.store, at.queue, PLAN)
    first = painter.paint(ENGLISH, "", {})
    assert first.changed["lab_cancel"].visible is True
    assert "Comparisons ended: 0 of 4" in first.changed["lab_progress"]
    assert first.changed["lab_figure"].type == "plotly"
    assert painter.paint(ENGLISH, "", first.marks).changed == {}
    known = labs.latest(at.store)
    assert known is not None
    at.store.update_run(known.runs[0], status="running")
    at.store.add_record(known.runs[0], record("gptq:4", kl=0.125))
    second = painter.paint(ENGLISH, "", first.marks)
    assert "0.125" in second.changed["lab_figure"].plot
    assert "calibrated on project, evaluated on a" in second.changed["lab_progress"]
    dark = painter.paint(Client("en", True), "", second.marks).changed
    assert "lab_figure" in dark
    assert "lab_notes" not in dark
