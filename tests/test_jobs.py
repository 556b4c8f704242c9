"""The queue with real workers and a fake pipeline: watching, cancels, crashes, restarts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab import waiting
from quantlab.errors import JobError, StorageError
from quantlab.jobs import JobQueue, JobView
from quantlab.progress import Forecast, RunProgress, plain_title
from quantlab.results import ResultRecord
from quantlab.store import Store
from quantlab.types import (
    Event,
    Notice,
    OutputDelta,
    Progress,
    RunSpec,
    VariantFinished,
    VariantSpec,
    VariantStarted,
)
from quantlab.worker import EventWriter

TESTS = Path(__file__).resolve().parent
ENDED = ("finished", "failed", "cancelled")
MakeQueue = Callable[[], JobQueue]


def variant(method: str, file: Path | None = None, bits: int | None = None) -> VariantSpec:
    return VariantSpec(method, bits, () if file is None else (("file", str(file)),))


def spec_of(*variants: VariantSpec | str, **fields: object) -> RunSpec:
    specs = tuple(variant(v) if isinstance(v, str) else v for v in variants)
    return replace(RunSpec(variants=specs), **fields)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "home")
    yield store
    store.close()


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the fake pipeline did, without process ids."""
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv("FAKE_LOG", str(path))
    return lambda: [line.rpartition(" ")[0] for line in path.read_text().splitlines()]


@pytest.fixture
def make_queue(store: Store, log: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeQueue]:
    """Queues on the store, stopped at the end; their workers run the fake pipeline."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    made: list[JobQueue] = []

    def make() -> JobQueue:
        made.append(JobQueue(store, pipeline="fake_pipeline"))
        return made[-1]

    yield make
    for queue in made:
        queue.stop()


@pytest.fixture
def queue(make_queue: MakeQueue) -> JobQueue:
    queue = make_queue()
    queue.start()
    return queue


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for what has to come; how long it takes is not what is tested."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def ended(queue: JobQueue, run_id: str) -> JobView:
    until(lambda: queue.view(run_id).status in ENDED)
    return queue.view(run_id)


def untimed(view: JobView) -> JobView:
    """The view without the only part that depends on when it is asked for."""
    return replace(view, seconds_left=None)


def states(view: JobView) -> list[str]:
    return [variant.state for variant in view.variants]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def lines(path: Path) -> int:
    """The process id that a fake variant wrote, once it is there."""
    until(path.exists)
    return int(path.read_text())


# A run from beginning to end


def test_a_run_ends_with_its_records_events_and_environment(queue: JobQueue, store: Store) -> None:
    spec = spec_of(variant("ok", bits=4), "silent", seed=3)
    run_id = queue.submit(spec)
    view = ended(queue, run_id)
    assert (view.status, view.fraction, view.position, view.message) == (
        "finished",
        1,
        0,
        "finished",
    )
    assert view.seconds_left is None
    assert view.notices == ("threads: 0",)
    assert states(view) == ["finished", "finished"]
    assert [v.record.perplexity for v in view.variants if v.record] == [20.0, 21.0]
    assert view.run == store.run(run_id)
    assert view.run.environment == {"machine": "fake", "seed": 3}
    assert view.run.spec == spec
    assert [v.label for v in view.variants] == ["ok:4", "silent"]
    kinds = [(e["kind"], e.get("variant")) for _, e in store.events(run_id)]
    assert kinds == [
        ("notice", None),
        ("variant_started", "ok:4"),
        ("progress", "ok:4"),
        ("variant_finished", "ok:4"),
        ("variant_started", "silent"),
        ("progress", "silent"),
        ("variant_finished", "silent"),
    ]


def test_the_view_of_a_running_job_is_the_same_everywhere(
    queue: JobQueue, make_queue: MakeQueue, store: Store, tmp_path: Path
) -> None:
    gate, run_id = tmp_path / "gate", ""
    spec = spec_of("ok", variant("talk", gate), "later", prompts=("a", "b", "c"))
    run_id = queue.submit(spec)
    until(lambda: queue.view(run_id).variants[1].outputs[1] == "one two three")
    view = queue.view(run_id)
    assert states(view) == ["finished", "running", "waiting"]
    talking = view.variants[1]
    assert (talking.stage, talking.done, talking.total) == ("quantize", 1, 4)
    assert talking.outputs == ("", "one two three", "")
    assert view.fraction == pytest.approx(1 / 3)
    assert view.message == "TALK · quantize · block 1/4"
    assert (queue.active(), queue.waiting()) == (run_id, [])

    assert untimed(make_queue().view(run_id)) == untimed(view)
    code = f"""
        import json, pathlib
        from quantlab.jobs import JobQueue
        from quantlab.store import Store
        view = JobQueue(Store(pathlib.Path({str(store.root)!r}))).view({run_id!r})
        variants = [[v.state, v.outputs] for v in view.variants]
        print(json.dumps([view.fraction, view.message, variants]))
    """
    told = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(told.stdout) == [
        view.fraction,
        view.message,
        [[v.state, list(v.outputs)] for v in view.variants],
    ]
    gate.touch()
    assert states(ended(queue, run_id)) == ["finished"] * 3
    assert make_queue().view(run_id) == queue.view(run_id)


def test_a_view_reads_only_what_is_new(
    queue: JobQueue, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = queue.submit(spec_of("ok", variant("gate", tmp_path / "gate")))
    until(lambda: queue.view(run_id).variants[1].stage)
    read: list[object] = []

    def timed_events(run: str, after: int = 0) -> list[tuple[int, float, dict[str, object]]]:
        rows = Store.timed_events(store, run, after)
        read.extend(rows)
        return rows

    def records(run: str) -> list[ResultRecord]:
        read.append(run)
        return Store.records(store, run)

    monkeypatch.setattr(store, "timed_events", timed_events)
    monkeypatch.setattr(store, "records", records)
    first = queue.view(run_id)
    assert untimed(queue.view(run_id)) == untimed(first)
    assert read == []
    store.append_events(run_id, [Notice("new")])
    assert queue.view(run_id).notices == ("threads: 0", "new")
    assert len(read) == 1


def test_progress_events_are_dropped_at_the_end_and_the_view_stays(
    queue: JobQueue, make_queue: MakeQueue, store: Store, tmp_path: Path
) -> None:
    spec = spec_of("ok", variant("hang", tmp_path / "pid"))
    label = spec.variants[1].label
    run_id = queue.submit(spec)
    until((tmp_path / "pid").exists)
    until(lambda: queue.view(run_id).variants[1].stage)
    store.append_events(
        run_id, [Progress(label, "quantize", step, 9, 0.5 + step / 100) for step in range(9)]
    )
    store.append_events(run_id, [Progress(label, "perplexity", 2, 5, 0.1)])
    queue.view(run_id)
    queue.cancel(run_id)
    view = ended(queue, run_id)
    assert view.fraction == pytest.approx(0.58)
    assert (view.variants[1].stage, view.variants[1].done) == ("perplexity", 2)
    assert len([e for _, e in store.events(run_id) if e["kind"] == "progress"]) == 3
    assert make_queue().view(run_id) == view


def test_output_without_end_does_not_stop_the_worker(queue: JobQueue) -> None:
    assert states(ended(queue, queue.submit(spec_of("flood")))) == ["finished"]


# The queue


def test_one_runs_and_the_others_wait_in_order(
    queue: JobQueue, tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    gate = tmp_path / "gate"
    first = queue.submit(spec_of(variant("gate", gate)))
    until(lambda: queue.active() == first)
    second, third = queue.submit(spec_of("a")), queue.submit(spec_of("b"))
    assert queue.submit(spec_of("a")) == second
    assert queue.submit(spec_of(variant("gate", gate))) == first
    assert queue.waiting() == [second, third]
    views = [queue.view(run_id) for run_id in (first, second, third)]
    assert [view.position for view in views] == [0, 1, 2]
    assert [view.status for view in views] == ["running", "queued", "queued"]
    assert states(views[1]) == ["waiting"]
    assert log()[1:] == []
    gate.touch()
    ended(queue, third)
    assert log() == [variant("gate", gate).label, "a", "b"]
    again = queue.submit(spec_of("a"))
    assert again not in (first, second, third)
    assert ended(queue, again).status == "finished"


def test_nothing_is_queued_without_variants_and_unknown_runs_are_named(queue: JobQueue) -> None:
    with pytest.raises(JobError, match="at least one"):
        queue.submit(RunSpec())
    for ask in (queue.view, queue.cancel):
        with pytest.raises(JobError, match="nowhere"):
            ask("nowhere")


def test_two_apps_on_one_store_do_the_work_once(
    make_queue: MakeQueue, log: Callable[[], list[str]]
) -> None:
    one, two = make_queue(), make_queue()
    one.start()
    two.start()
    two.start()
    ids = [queue.submit(spec_of(f"v{number}")) for number, queue in enumerate((one, two, one))]
    for run_id in ids:
        assert ended(one, run_id).status == "finished"
    one.stop()
    two.stop()
    assert log() == ["v0", "v1", "v2"]


def test_a_second_app_takes_over(make_queue: MakeQueue) -> None:
    one, two = make_queue(), make_queue()
    one.start()
    ended(two, two.submit(spec_of("a")))
    two.start()
    one.stop()
    assert ended(two, two.submit(spec_of("b"))).status == "finished"


# Cancel


@pytest.mark.parametrize("method", ["hang", "stubborn"])
def test_cancel_takes_effect_within_two_seconds(
    queue: JobQueue, tmp_path: Path, method: str
) -> None:
    def cancel(name: str) -> tuple[str, float]:
        run_id = queue.submit(spec_of("ok", variant(method, tmp_path / name), "later"))
        worker = lines(tmp_path / name)
        began = time.monotonic()
        queue.cancel(run_id)
        until(lambda: gone(worker) and queue.view(run_id).status == "cancelled")
        return run_id, time.monotonic() - began

    run_id, seconds = cancel("first")
    # A machine that stood still for a moment gets a second and a third chance.
    assert seconds <= 2.0 or cancel("second")[1] <= 2.0 or cancel("third")[1] <= 2.0
    view = queue.view(run_id)
    assert states(view) == ["finished", "cancelled", "cancelled"]
    assert [r.status for r in view.run.records] == ["finished", "cancelled", "cancelled"]
    assert view.message == "cancelled"
    queue.cancel(run_id)  # Once more changes nothing.
    assert queue.view(run_id) == view


def test_cancel_ends_what_the_worker_started(queue: JobQueue, tmp_path: Path) -> None:
    run_id = queue.submit(spec_of(variant("parent", tmp_path / "pid")))
    child = lines(tmp_path / "pid")
    queue.cancel(run_id)
    until(lambda: gone(child))


def test_cancel_while_the_disk_is_full(
    queue: JobQueue, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = queue.submit(spec_of("ok", variant("stubborn", tmp_path / "pid")))
    queued = queue.submit(spec_of("a"))
    worker = lines(tmp_path / "pid")
    real, tried = (waiting.request_cancel, waiting.end), []

    def refuse(*arguments: object) -> None:
        tried.append(arguments)
        raise StorageError("the disk is full")

    monkeypatch.setattr(waiting, "request_cancel", refuse)
    monkeypatch.setattr(waiting, "end", refuse)
    with pytest.raises(StorageError):
        queue.cancel(queued)
    queue.cancel(run_id)
    until(lambda: gone(worker) and queue.view(run_id).status == "cancelled")
    assert states(queue.view(run_id)) == ["finished", "cancelled"]
    assert len(queue.view(run_id).run.records) == 2
    assert store.run(run_id).status == "running"
    until(lambda: len(tried) > 3)  # It is tried again, until there is room.
    monkeypatch.setattr(waiting, "request_cancel", real[0])
    monkeypatch.setattr(waiting, "end", real[1])
    until(lambda: store.run(run_id).status == "cancelled")
    run = store.run(run_id)
    assert [r.status for r in run.records] == ["finished", "cancelled"]


def test_cancel_of_a_waiting_run(
    queue: JobQueue, tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    gate = tmp_path / "gate"
    first = queue.submit(spec_of(variant("gate", gate)))
    second, third = queue.submit(spec_of("a", "b")), queue.submit(spec_of("c"))
    until(lambda: queue.active() == first)
    queue.cancel(second)
    view = queue.view(second)
    assert (view.status, states(view)) == ("cancelled", ["cancelled", "cancelled"])
    assert queue.waiting() == [third]
    assert queue.view(third).position == 1
    gate.touch()
    ended(queue, third)
    assert "a" not in log()


def test_cancel_from_another_app(queue: JobQueue, make_queue: MakeQueue, tmp_path: Path) -> None:
    run_id = queue.submit(spec_of(variant("hang", tmp_path / "pid")))
    worker = lines(tmp_path / "pid")
    make_queue().cancel(run_id)
    until(lambda: gone(worker))
    assert ended(queue, run_id).status == "cancelled"


def test_a_pipeline_that_gives_up_is_cancelled(queue: JobQueue) -> None:
    view = ended(queue, queue.submit(spec_of("ok", "gives_up", "later")))
    assert (view.status, states(view)) == ("cancelled", ["finished", "cancelled", "cancelled"])


# Workers that die


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("killed", "the worker was killed (signal 9), most likely out of memory"),
        ("segfault", "the worker crashed (signal 11: Segmentation fault)"),
        ("exit", "the worker stopped with exit code 7: the last words"),
        ("raise", "the worker stopped: RuntimeError: boom"),
    ],
)
def test_a_death_costs_one_variant(
    queue: JobQueue, log: Callable[[], list[str]], method: str, reason: str
) -> None:
    view = ended(queue, queue.submit(spec_of("ok", variant(method, bits=3), "more", "last")))
    assert view.status == "finished"
    assert states(view) == ["finished", "failed", "finished", "finished"]
    lost = view.variants[1].record
    assert lost is not None
    assert (lost.variant, lost.method, lost.bits) == (f"{method}:3", method, 3)
    assert lost.error == reason
    assert (lost.hint is not None) == (method == "killed")
    assert log() == ["ok", f"{method}:3", "more", "last"]


def test_every_death_leaves_the_others(queue: JobQueue, log: Callable[[], list[str]]) -> None:
    view = ended(queue, queue.submit(spec_of("killed", "ok", "exit", "more")))
    assert states(view) == ["failed", "finished", "failed", "finished"]
    assert log() == ["killed", "ok", "exit", "more"]


def test_a_run_without_any_result_has_failed(queue: JobQueue) -> None:
    view = ended(queue, queue.submit(spec_of("killed")))
    assert view.status == "failed"
    assert view.run.error is not None
    assert "killed (signal 9)" in view.run.error
    assert view.message == view.run.error


def test_a_worker_that_dies_before_its_first_variant_is_tried_twice(
    queue: JobQueue, log: Callable[[], list[str]]
) -> None:
    view = ended(queue, queue.submit(spec_of("a", "b", model="deadly")))
    assert view.status == "failed"
    assert states(view) == ["failed", "failed"]
    assert [r.error for r in view.run.records] == [
        "the worker was killed (signal 9), most likely out of memory"
    ] * 2
    assert log() == ["load", "load"]
    assert ended(queue, queue.submit(spec_of("a"))).status == "finished"


def test_wrong_input_fails_the_run_with_its_one_message(
    queue: JobQueue, log: Callable[[], list[str]]
) -> None:
    view = ended(queue, queue.submit(spec_of("a", "b", model="missing")))
    assert (view.status, view.run.records) == ("failed", ())
    assert view.message == "model: there is no 'missing' (try bundled)"
    assert states(view) == ["failed", "failed"]


def test_a_variant_without_result_is_a_failed_row(
    queue: JobQueue, log: Callable[[], list[str]]
) -> None:
    view = ended(queue, queue.submit(spec_of("lost", variant("lost", bits=3), "ok")))
    assert states(view) == ["failed", "failed", "finished"]
    for record in view.run.records[:2]:
        assert "without a result" in str(record.error)
    assert log() == ["lost", "lost:3", "ok"]


def test_a_full_disk_ends_the_run_and_keeps_what_was_finished(
    queue: JobQueue, log: Callable[[], list[str]], tmp_path: Path
) -> None:
    view = ended(queue, queue.submit(spec_of("ok", variant("full", tmp_path), "later")))
    assert view.status == "failed"
    assert "the disk is full" in view.message
    assert "finished before is kept" in view.message
    assert states(view) == ["finished", "failed", "failed"]
    assert log() == ["ok", variant("full", tmp_path).label]


# Stops and restarts


def test_stop_leaves_the_run_to_the_next_start(
    make_queue: MakeQueue, tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    gate = tmp_path / "gate"
    one = make_queue()
    one.start()
    run_id, later = one.submit(spec_of("ok", variant("gate", gate))), one.submit(spec_of("b"))
    until(lambda: one.view(run_id).variants[1].state == "running")
    one.stop()
    one.stop()
    view = one.view(run_id)
    assert (view.status, view.position, states(view)) == ("queued", 1, ["finished", "waiting"])
    assert one.waiting() == [run_id, later]
    gate.touch()
    two = make_queue()
    two.start()
    assert states(ended(two, run_id)) == ["finished", "finished"]
    ended(two, later)
    label = variant("gate", gate).label
    assert log() == ["ok", label, label, "b"]


APP = """
    import sys, time
    from pathlib import Path
    from quantlab.jobs import JobQueue
    from quantlab.store import Store
    queue = JobQueue(Store(Path(sys.argv[1])), pipeline="fake_pipeline")
    queue.start()
    time.sleep(600)
"""


def test_a_worker_dies_with_its_app_and_the_next_app_goes_on(
    store: Store, make_queue: MakeQueue, tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    queue = make_queue()
    spec = spec_of("ok", variant("stubborn", tmp_path / "pid"), "last")
    run_id = queue.submit(spec)
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(APP), str(store.root)],
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
    ) as app:
        worker = lines(tmp_path / "pid")
        assert states(queue.view(run_id)) == ["finished", "running", "waiting"]
        app.kill()
    until(lambda: gone(worker))
    (tmp_path / "pid").unlink()
    queue.start()
    worker = lines(tmp_path / "pid")
    assert log() == ["ok", spec.variants[1].label, spec.variants[1].label]
    os.kill(worker, signal.SIGKILL)
    assert states(ended(queue, run_id)) == ["finished", "failed", "finished"]


def test_a_run_of_a_killed_command_line_becomes_failed(store: Store, make_queue: MakeQueue) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from quantlab.store import Store
        from quantlab.types import RunSpec
        store = Store(Path(sys.argv[1]))
        run_id = store.create_run(RunSpec())
        store.update_run(run_id, status="running")
        print(run_id, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(store.root)],
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    dead, alive = done.stdout.strip(), store.create_run(RunSpec())
    store.update_run(alive, status="running")
    queue = make_queue()
    assert (queue.active(), queue.waiting()) == (None, [])
    with pytest.raises(JobError, match="command line"):
        queue.cancel(alive)
    queue.start()
    assert ended(queue, queue.submit(spec_of("a"))).status == "finished"
    assert (store.run(dead).status, store.run(dead).error) == ("failed", waiting.ABANDONED)
    assert store.run(alive).status == "running"


def test_a_job_waits_while_the_command_line_measures(
    queue: JobQueue, store: Store, log: Callable[[], list[str]]
) -> None:
    with store.measuring_lock():
        run_id = queue.submit(spec_of("a"))
        notice = f"waiting for another comparison on this machine (process {os.getpid()}) to finish"
        until(lambda: queue.view(run_id).message == notice)
        assert log() == []
    view = ended(queue, run_id)
    assert view.status == "finished"
    assert view.notices[0] == notice


# Answers


def test_variants_that_finished_answer_new_prompts(
    queue: JobQueue, log: Callable[[], list[str]]
) -> None:
    parent = queue.submit(spec_of("ok", "killed", "more"))
    ended(queue, parent)
    spec = spec_of("ok", "killed", "more", prompts=("one", "two"))
    run_id = queue.submit(spec, kind="answer", parent=parent)
    view = ended(queue, run_id)
    assert (view.run.kind, view.run.parent, view.status) == ("answer", parent, "finished")
    assert [v.label for v in view.variants] == ["ok", "more"]
    assert [v.outputs for v in view.variants] == [
        ("ok on one.", "ok on two."),
        ("more on one.", "more on two."),
    ]
    assert view.run.records[1].perplexity == 22.0
    assert log()[-2:] == ["answer-ok", "answer-more"]


def test_answers_need_a_comparison_prompts_and_a_result(queue: JobQueue) -> None:
    parent = queue.submit(spec_of("killed"))
    ended(queue, parent)
    asked = RunSpec(prompts=("one",))
    for arguments, reason in (
        ((asked, "answer", None), "need the comparison"),
        ((RunSpec(), "answer", parent), "prompts"),
        ((asked, "answer", parent), "no variant"),
        ((asked, "answer", "nowhere"), "nowhere"),
    ):
        with pytest.raises(JobError, match=reason):
            queue.submit(*arguments)


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
