"""Time left, fractions and titles of a run, and the writer of its events."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.errors import StorageError
from quantlab.progress import Forecast, RunProgress, plain_title
from quantlab.results import ResultRecord
from quantlab.store import Store
from quantlab.types import (
    Event,
    Notice,
    OutputDelta,
    Progress,
    VariantFinished,
    VariantSpec,
    VariantStarted,
)
from quantlab.worker import EventWriter
from tests.jobs.queueing import (
    spec_of,
)

# Progress and time left


def test_time_left_follows_from_the_speed_so_far() -> None:
    forecast = Forecast()
    forecast.add(100.0, 0.25)
    forecast.add(100.5, 0.26)
    assert forecast.seconds_left(100.5) is None  # Half a second says nothing.
    for step in range(1, 41):
        forecast.add(100.0 + step, 0.25 + step / 100)
    # One hundredth a second from 0.25, so 0.35 are left at 0.65.
    assert forecast.seconds_left(140.0) == pytest.approx(35.0)
    assert forecast.seconds_left(150.0) == pytest.approx(25.0)
    # Stuck: the time left does not stay at nothing.
    assert forecast.seconds_left(300.0) == pytest.approx(0.35 * 160)


def test_a_change_of_speed_shows_gradually() -> None:
    forecast = Forecast()
    for step in range(21):
        forecast.add(float(step), step / 100)
    before = forecast.seconds_left(20.0)
    forecast.add(21.0, 0.6)
    after = forecast.seconds_left(21.0)
    assert before is not None
    assert after is not None
    raw = 0.4 * 21 / 0.6
    assert raw < after < before - 1.0


def event_rows(*events: dict[str, object]) -> list[tuple[int, float, dict[str, object]]]:
    return [(number, 100.0 + 10 * number, event) for number, event in enumerate(events, 1)]


def progress_event(fraction: float, name: str = "a") -> dict[str, object]:
    return {"kind": "progress", "variant": name, "stage": "quantize", "done": 1, "total": 2} | {
        "fraction": fraction
    }


def test_a_fresh_worker_keeps_the_fraction_and_forgets_speed_and_texts() -> None:
    rows = event_rows(
        {"kind": "variant_started", "variant": "a"},
        {"kind": "output", "variant": "a", "prompt": 0, "text": "half"},
        progress_event(0.2),
        progress_event(0.6),
        {"kind": "from_the_future", "variant": "a"},
        {"kind": "variant_started", "variant": "a"},
        {"kind": "output", "variant": "a", "prompt": 0, "text": "whole"},
        progress_event(0.1),
    )
    progress = RunProgress(["a"])
    progress.read(rows[:5], attempt=0)
    assert progress.current == "a"
    assert progress.forecast.seconds_left(140.0) is not None
    progress.read([], attempt=5)
    assert progress.current is None
    assert progress.forecast.seconds_left(140.0) is None
    progress.read(rows[5:], attempt=5)
    assert progress.fraction == 0.6
    assert progress.forecast.seconds_left(180.0) is None
    assert progress.steps["a"].outputs == ["whole"]
    at_once = RunProgress(["a"])
    at_once.read(rows, attempt=5)
    assert vars(at_once) == vars(progress)


def test_titles_from_labels() -> None:
    assert plain_title(VariantSpec("gptq", 4)) == "GPTQ 4-bit"
    assert plain_title(VariantSpec("bf16")) == "BF16"
    assert plain_title(VariantSpec("gguf", None, (("type", "q4_k_m"),))) == "GGUF Q4_K_M"
    assert plain_title(VariantSpec("smoothquant", 8)) == "Smoothquant 8-bit"


# The worker's writer

EVENTS = st.lists(
    st.one_of(
        st.builds(OutputDelta, st.sampled_from("ab"), st.integers(0, 1), st.text(max_size=3)),
        st.builds(
            Progress,
            st.sampled_from("ab"),
            st.sampled_from(["x", "y"]),
            st.integers(0, 9),
            st.just(9),
            st.floats(0, 1),
        ),
        st.builds(VariantStarted, st.sampled_from("ab")),
        st.builds(Notice, st.sampled_from(["n", "m"])),
        st.none(),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(EVENTS)
def test_joined_events_tell_the_same(
    tmp_path_factory: pytest.TempPathFactory, events: list[Event | None]
) -> None:
    store = Store(tmp_path_factory.getbasetemp() / "events")
    run_id = store.create_run(spec_of("a", "b"))
    expected: dict[str, list[str]] = {"a": [], "b": []}
    last: dict[tuple[str, str], Progress] = {}
    writer = EventWriter(store, run_id)
    for event in events:
        if event is None:
            writer.flush()
            continue
        writer.emit(event)
        if isinstance(event, VariantStarted):
            expected[event.variant] = []
        elif isinstance(event, OutputDelta):
            texts = expected[event.variant]
            texts.extend([""] * (event.prompt + 1 - len(texts)))
            texts[event.prompt] += event.text
        elif isinstance(event, Progress):
            last[event.variant, event.stage] = event
    writer.flush()
    rows = store.timed_events(run_id)
    progress = RunProgress("ab")
    progress.read(rows, 0)
    assert {label: step.outputs for label, step in progress.steps.items()} == expected
    told = {(e["variant"], e["stage"]): e["done"] for _, _, e in rows if e["kind"] == "progress"}
    assert told == {key: event.done for key, event in last.items()}
    store.close()


def test_small_events_wait_a_moment_and_the_rest_is_written_at_once(store: Store) -> None:
    run_id = store.create_run(spec_of("a"))
    writer = EventWriter(store, run_id)
    for step in range(1000):
        writer.emit(OutputDelta("a", 0, "x"))
        writer.emit(Progress("a", "quantize", step, 1000, 0.5))
    assert store.events(run_id) == []
    record = ResultRecord("a", "a", 4, {}, "finished")
    writer.emit(VariantFinished("a", record.to_json()))
    kinds = [(e["kind"], e.get("done"), len(e.get("text", ""))) for _, e in store.events(run_id)]
    assert kinds == [("output", None, 1000), ("progress", 999, 0), ("variant_finished", None, 0)]
    assert store.records(run_id) == [record]


def test_a_writer_that_cannot_write_says_so_where_the_work_is_done(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = store.create_run(spec_of("a"))
    failed = StorageError("the disk is full")

    def refuse(*arguments: object) -> None:
        raise failed

    monkeypatch.setattr(store, "append_events", refuse)

    def work() -> None:
        with EventWriter(store, run_id) as writer:
            while True:  # Until the writing thread has met the full disk.
                writer.emit(OutputDelta("a", 0, "x"))
                time.sleep(0.01)

    with pytest.raises(StorageError) as caught:
        work()
    assert caught.value is failed
