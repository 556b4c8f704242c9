"""Workers and apps that die, stop and start again: what costs what, and what goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from quantlab import waiting
from quantlab.errors import JobError
from quantlab.jobs import JobQueue
from quantlab.store import Store
from quantlab.types import (
    RunSpec,
)
from tests.jobs.queueing import (
    TESTS,
    MakeQueue,
    ended,
    gone,
    lines,
    spec_of,
    states,
    until,
    variant,
)

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
