"""The store: what is kept, what several processes do to it at once, and what it says in trouble."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantlab.database import MIGRATIONS
from quantlab.errors import JobError, StorageError
from quantlab.locks import FileLock
from quantlab.results import ResultRecord
from quantlab.store import Store, home, storage_errors
from quantlab.types import Notice, OutputDelta, Progress, RunSpec, VariantSpec
from quantlab.votes import Vote

ROOT = Path(__file__).resolve().parent.parent
SPEC = RunSpec(variants=(VariantSpec("bf16"), VariantSpec("rtn", 4)), prompts=("Hello",))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "home")
    yield store
    store.close()


def record(variant: str = "rtn:4", **fields: Any) -> ResultRecord:
    values: dict[str, Any] = {"status": "finished", "perplexity": 21.5, "config": {"bits": 4}}
    return ResultRecord(variant=variant, method="rtn", bits=4, **(values | fields))


def python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A Python process on this checkout; its stdout can be read line by line."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# Where it lies


def test_home_is_the_named_folder_and_nothing_is_made_by_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTLAB_HOME", str(tmp_path / "there"))
    assert home() == tmp_path / "there"
    assert not home().exists()
    with_default = Store()
    assert with_default.root == tmp_path / "there"
    with_default.close()


def test_importing_the_queue_needs_neither_torch_nor_the_pipeline() -> None:
    process = python(
        """
        import sys
        import quantlab.jobs, quantlab.store, quantlab.worker
        heavy = {"torch", "numpy", "transformers", "quantlab.pipeline", "quantlab.methods"}
        print(sorted(heavy & set(sys.modules)))
        """
    )
    assert process.communicate()[0].strip() == "[]"


# Cached results


def test_a_finished_record_comes_back_whole_and_others_are_not_cached(store: Store) -> None:
    kept = record(perplexity_ci=(20.0, 23.0), segments={"nll": [1.0, 2.5]}, fallbacks=("slow",))
    store.save("key", kept)
    store.save("failed", record(status="failed", error="no"))
    assert store.cached("key") == kept
    assert store.cached("failed") is None
    assert store.cached("unknown") is None
    store.save("key", replace(kept, perplexity=9.0))
    assert store.cached("key") == replace(kept, perplexity=9.0)


def test_a_cached_record_of_another_version_is_measured_again(store: Store) -> None:
    store.save("key", record())
    with store.database.transaction() as db:
        db.execute("UPDATE results SET record = json_set(record, '$.from_the_future', 1)")
    assert store.cached("key") is None


def test_results_outlive_the_process(store: Store) -> None:
    process = python(
        """
        import os, pathlib, signal, sys
        from quantlab.results import ResultRecord
        from quantlab.store import Store
        store = Store(pathlib.Path(sys.argv[1]))
        store.save("key", ResultRecord("rtn:4", "rtn", 4, {}, "finished", perplexity=3.25))
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        store.root,
    )
    assert process.wait() == -signal.SIGKILL
    found = store.cached("key")
    assert found is not None
    assert found.perplexity == 3.25
    process.communicate()


# Runs


def test_a_run_is_kept_with_its_records_in_the_order_of_its_variants(store: Store) -> None:
    run_id = store.create_run(SPEC)
    run = store.run(run_id)
    assert (run.status, run.kind, run.spec, run.records) == ("queued", "compare", SPEC, ())
    assert (run.started, run.ended, run.error, run.parent) == (None, None, None, None)

    store.update_run(run_id, status="running", environment={"cpu": "x"})
    store.add_record(run_id, record("rtn:4"))
    store.add_record(run_id, record("rtn:4", perplexity=5.0))
    store.add_record(run_id, record("bf16"))
    store.update_run(run_id, status="finished")
    run = store.run(run_id)
    assert [(r.variant, r.perplexity) for r in run.records] == [("bf16", 21.5), ("rtn:4", 5.0)]
    assert run.environment == {"cpu": "x"}
    assert run.started is not None
    assert run.ended is not None
    assert run.created <= run.started <= run.ended


def test_runs_are_listed_newest_first_up_to_a_limit(store: Store) -> None:
    ids = [store.create_run(SPEC) for _ in range(5)]
    assert [run.id for run in store.runs()] == ids[::-1]
    assert [run.id for run in store.runs(limit=2)] == [ids[4], ids[3]]


def test_an_unknown_run_is_named(store: Store) -> None:
    for ask in (
        lambda: store.run("nowhere"),
        lambda: store.update_run("nowhere", status="failed"),
        lambda: store.add_record("nowhere", record()),
        lambda: store.append_events("nowhere", [Notice("x")]),
        lambda: store.delete_run("nowhere"),
        lambda: store.create_run(SPEC, "answer", "nowhere"),
    ):
        with pytest.raises(JobError, match="nowhere"):
            ask()


def test_a_record_of_another_version_becomes_a_row_that_says_so(store: Store) -> None:
    run_id = store.create_run(SPEC)
    store.add_record(run_id, record("rtn:4"))
    with store.database.transaction() as db:
        db.execute("UPDATE records SET record = json_set(record, '$.from_the_future', 1)")
    (row,) = store.run(run_id).records
    assert (row.variant, row.bits, row.status) == ("rtn:4", 4, "failed")
    assert row.error is not None
    assert "another version" in row.error


def test_deleting_a_run_takes_its_answers_and_leaves_the_cache(store: Store) -> None:
    store.save("key", record())
    run_id, other = store.create_run(SPEC), store.create_run(SPEC)
    answers = store.create_run(SPEC, "answer", run_id)
    again = store.create_run(SPEC, "compare", run_id)
    store.add_record(run_id, record())
    store.append_events(run_id, [Notice("x")])
    for each in (run_id, other, again):
        store.update_run(each, status="finished")
    store.update_run(answers, status="running")
    with pytest.raises(JobError, match=answers):
        store.delete_run(run_id)
    assert store.run(run_id).records

    store.update_run(answers, status="finished")
    store.delete_run(run_id)
    assert {run.id for run in store.runs()} == {other, again}
    assert store.run(again).parent is None
    assert store.events(run_id) == []
    assert store.records(run_id) == []
    assert store.cached("key") is not None


def test_an_error_with_an_undecodable_file_name_can_be_kept(store: Store) -> None:
    run_id = store.create_run(SPEC)
    store.update_run(run_id, status="failed", error="no such file: \udcff.gguf")
    assert store.run(run_id).error == "no such file: \\udcff.gguf"


# Events


def test_events_are_read_from_where_one_left_off(store: Store) -> None:
    run_id, other = store.create_run(SPEC), store.create_run(SPEC)
    store.append_events(run_id, [Progress("bf16", "load", 0, 2, 0.0), Notice("é \udcff")])
    store.append_events(other, [Notice("of another run")])
    first = store.events(run_id)
    assert [event for _, event in first] == [
        {"variant": "bf16", "stage": "load", "done": 0, "total": 2, "fraction": 0.0}
        | {"kind": "progress"},
        {"message": "é \udcff", "kind": "notice"},
    ]
    last = first[-1][0]
    assert store.events(run_id, after=last) == []
    store.append_events(run_id, [OutputDelta("bf16", 0, "text")])
    ((number, event),) = store.events(run_id, after=last)
    assert number > last
    assert event["text"] == "text"


# Blind votes


def test_votes_are_kept_with_their_comparison(store: Store) -> None:
    run_id, other = store.create_run(SPEC), store.create_run(SPEC)
    given = [
        Vote("Why?", "bf16", "rtn:4", None),
        Vote("<script>", "rtn:4", "bf16", "bf16"),
        Vote("Why?", "bf16", "rtn:4", None),
    ]
    for vote in given:
        store.add_vote(run_id, vote)
    store.add_vote(other, given[1])
    store.close()
    assert Store(store.root).votes(run_id) == given
    store.update_run(run_id, status="finished")
    store.delete_run(run_id)
    assert store.votes(run_id) == []
    assert store.votes(other) == [given[1]]
    with pytest.raises(JobError, match="no run"):
        store.add_vote(run_id, given[0])


def test_a_store_from_before_the_votes_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "quantlab.sqlite"
    with sqlite3.connect(path) as db:
        db.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
        db.execute(
            "INSERT INTO runs (id, kind, spec, status, created, environment, owner)"
            " VALUES ('old', 'compare', ?, 'finished', 0, '{}', '')",
            (SPEC.dumps(),),
        )
    db.close()
    store = Store(tmp_path)
    assert store.run("old").spec == SPEC
    store.add_vote("old", Vote("Why?", "bf16", "rtn:4", "bf16"))
    assert store.votes("old")[0].winner == "bf16"


# Several at once


def test_processes_and_threads_write_at_once(tmp_path: Path) -> None:
    # All open a store that does not exist yet, at the same moment.
    code = """
        import pathlib, sys, threading
        from quantlab.store import Store
        from quantlab.types import Notice, RunSpec
        print("ready", flush=True)
        sys.stdin.readline()
        store = Store(pathlib.Path(sys.argv[1]))
        run_id = store.create_run(RunSpec())
        def write(name):
            for number in range(20):
                store.append_events(run_id, [Notice(f"{name} {number}")])
        threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(run_id)
    """
    root = tmp_path / "new"
    writers = [python(code, root, stdin=subprocess.PIPE) for _ in range(4)]
    assert [line_of(writer) for writer in writers] == ["ready"] * 4
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    ids = [writer.communicate()[0].strip() for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4
    store = Store(root)
    assert {run.id for run in store.runs()} == set(ids)
    for run_id in ids:
        messages = [event["message"] for _, event in store.events(run_id)]
        assert [m for m in messages if m[0] == "a"] == [f"a {number}" for number in range(20)]
        assert [m for m in messages if m[0] == "b"] == [f"b {number}" for number in range(20)]
    store.close()


def test_a_transaction_is_all_or_nothing_and_unseen_until_its_end(store: Store) -> None:
    reader = Store(store.root)
    run_id = store.create_run(SPEC)

    def half() -> None:
        with store.database.transaction():
            store.add_record(run_id, record())
            assert reader.records(run_id) == []
            raise KeyError("half way")

    with pytest.raises(KeyError):
        half()
    assert store.records(run_id) == []
    reader.close()


def test_threads_do_not_mix_their_transactions(store: Store) -> None:
    run_id = store.create_run(SPEC)
    thread = threading.Thread(target=store.append_events, args=(run_id, [Notice("other")]))

    def half() -> None:
        with store.database.transaction():
            store.append_events(run_id, [Notice("mine")])
            thread.start()
            thread.join(0.3)
            raise KeyError("half way")

    with pytest.raises(KeyError):
        half()
    thread.join()
    assert [event["message"] for _, event in store.events(run_id)] == ["other"]


def test_the_database_is_set_up_for_sharing(store: Store) -> None:
    with store.database.transaction() as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA foreign_keys").fetchone() == (1,)
        assert db.execute("PRAGMA busy_timeout").fetchone()[0] >= 10_000
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        with pytest.raises(sqlite3.IntegrityError):
            db.execute("INSERT INTO records (run_id, variant, record) VALUES ('no', 'v', '{}')")


# Trouble


def test_a_damaged_database_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "quantlab.sqlite"
    path.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(StorageError, match="move it away") as caught:
        Store(tmp_path)
    assert str(path) in str(caught.value)


def test_a_truncated_database_is_named_with_what_to_do(store: Store) -> None:
    run_id = store.create_run(SPEC)
    store.append_events(run_id, [Notice("x" * 200) for _ in range(500)])
    store.close()
    size = store.database.path.stat().st_size
    os.truncate(store.database.path, size // 3)
    with pytest.raises(StorageError, match="move it away") as caught:
        Store(store.root).events(run_id)
    assert str(store.database.path) in str(caught.value)


def test_a_database_of_a_newer_version_is_left_alone(store: Store) -> None:
    with store.database.transaction() as db:
        db.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(StorageError, match="newer QuantLab"):
        Store(store.root)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        Store(tmp_path / "file" / "home")


def test_a_full_database_keeps_what_was_finished(store: Store) -> None:
    store.save("kept", record())
    with store.database.transaction(write=False) as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match=r"disk is full.*finished before is kept"):
        store.save("more", record(outputs=(), segments={"nll": [0.5] * 50_000}))
    assert store.cached("kept") == record()
    assert store.cached("more") is None
    with store.database.transaction(write=False) as db:
        db.execute("PRAGMA max_page_count = 1000000")
    store.save("more", record())
    assert store.cached("more") == record()


def test_a_really_full_disk_keeps_what_was_finished(tmp_path: Path) -> None:
    script = """
        import numpy, pathlib, sys
        from safetensors.numpy import save_file
        from quantlab.errors import StorageError
        from quantlab.results import ResultRecord
        from quantlab.store import Store, storage_errors
        root = pathlib.Path(sys.argv[1])
        record = ResultRecord("rtn:4", "rtn", 4, {}, "finished", perplexity=3.0)
        store = Store(root)
        store.save("kept", record)
        try:
            with storage_errors(root):
                save_file({"weight": numpy.zeros(2_000_000, numpy.uint8)}, root / "weights")
        except StorageError as error:
            print("weights:", error)
        for left in root.glob("weights*"):
            left.unlink()
        try:
            with storage_errors(root), (root / "filler").open("wb", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass
        except StorageError as error:
            print("artifact:", error)
        try:
            for number in range(100):
                store.save(str(number), record)
        except StorageError as error:
            print("result:", error)
        print(store.cached("kept") == record, Store(root).cached("kept") == record)
        (root / "filler").unlink()
        store.save("later", record)
        print(Store(root).cached("later") == record)
    """
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mounted += ['mount -t tmpfs -o size=1m none "$0" && exec "$@"', str(tmp_path)]
    try:
        subprocess.run([*mounted, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small file system cannot be mounted here")
    done = subprocess.run(
        [*mounted, sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    weights, artifact, result, *rest = done.stdout.splitlines()
    assert weights.startswith("weights: the disk is full")
    assert artifact.startswith("artifact: the disk is full")
    assert result.startswith("result: the disk is full")
    assert rest == ["True True", "True"]


def test_only_trouble_with_files_becomes_a_storage_error(tmp_path: Path) -> None:
    for other in (OSError("no such model"), ConnectionRefusedError(111, "such a thing")):
        with pytest.raises(OSError, match="such") as caught, storage_errors(tmp_path):
            raise other
        assert caught.value is other
    with pytest.raises(StorageError, match=r"weights.*denied"), storage_errors(tmp_path):
        raise PermissionError(errno.EACCES, "denied", "weights")


# Artifacts


def fill(store: Store, key: str, size: int, used: float) -> Path:
    path = store.artifact(key)
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "weights").write_bytes(bytes(size))
    os.utime(path, (used, used))
    return path


def names(store: Store) -> set[str]:
    return {path.name for path in (store.root / "artifacts").iterdir()}


def test_an_artifact_folder_is_named_but_not_made(store: Store) -> None:
    path = store.artifact("0f3a")
    assert path == store.root / "artifacts" / "0f3a"
    assert path.parent.is_dir()
    assert not path.exists()
    for wrong in ("", "..", "a/b", ".hidden", "../x"):
        with pytest.raises(ValueError, match="artifact key"):
            store.artifact(wrong)


def test_the_least_recently_used_artifacts_go_first(store: Store) -> None:
    for age, key in enumerate(("newest", "newer", "older", "oldest")):
        fill(store, key, 1000, used=1_000_000 - age)
    store.save("hit", record(artifact="oldest"))
    fresh = Store(store.root)
    assert fresh.prune_artifacts(4000) == 0
    assert fresh.cached("hit") is not None  # A hit is a use.
    assert Store(store.root).prune_artifacts(2500) == 2000
    assert names(store) == {"newest", "oldest"}
    fresh.close()


def test_artifacts_in_use_are_never_pruned(store: Store) -> None:
    for age, key in enumerate(("idle", "mine", "running", "asked")):
        fill(store, key, 1000, used=1_000_000 - age)
    running, parent = store.create_run(SPEC), store.create_run(SPEC)
    ended = store.create_run(SPEC)
    store.add_record(running, record(artifact="running"))
    store.add_record(parent, record(artifact=str(store.root / "artifacts" / "asked")))
    store.add_record(ended, record(artifact="idle"))
    store.update_run(running, status="running")
    for run_id in (parent, ended):
        store.update_run(run_id, status="finished")
    answers = store.create_run(SPEC, "answer", parent)

    fresh = Store(store.root)
    fresh.artifact("mine")
    assert fresh.prune_artifacts(0) == 1000
    assert names(store) == {"mine", "running", "asked"}
    for run_id in (running, answers):
        store.update_run(run_id, status="finished")
    assert Store(store.root).prune_artifacts(0) == 3000
    assert names(store) == set()
    fresh.close()


def test_saving_prunes(store: Store) -> None:
    fill(store, "old", 1000, used=1_000_000)
    fresh = Store(store.root, keep_artifact_bytes=500)
    fresh.save("key", record())
    assert names(store) == set()
    fresh.close()


# The measuring lock

HOLDER = """
    import pathlib, sys
    from quantlab.store import Store
    with Store(pathlib.Path(sys.argv[1])).measuring_lock():
        print("held", flush=True)
        sys.stdin.readline()
"""


def test_measuring_waits_for_another_process_and_says_for_whom(store: Store) -> None:
    holder = python(HOLDER, store.root, stdin=subprocess.PIPE)
    assert line_of(holder) == "held"
    told, measured = threading.Event(), threading.Event()
    notices: list[str] = []

    def tell(event: object) -> None:
        assert isinstance(event, Notice)
        notices.append(event.message)
        told.set()

    def measure() -> None:
        with store.measuring_lock(tell):
            measured.set()

    thread = threading.Thread(target=measure)
    thread.start()
    assert told.wait(20)
    assert not measured.is_set()
    holder.communicate("\n")
    assert measured.wait(20)
    thread.join()
    assert notices == [
        f"waiting for another comparison on this machine (process {holder.pid}) to finish"
    ]


def test_a_holder_without_a_name_is_waited_for_once(store: Store) -> None:
    path = store.root / "measuring.lock"
    lock = FileLock(path)
    notices: list[object] = []
    assert lock.acquire()
    path.write_text("")

    def measure() -> None:
        with store.measuring_lock(notices.append):
            pass

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join(0.7)
    assert notices == [Notice("waiting for another comparison on this machine to finish")]
    lock.release()
    thread.join()
    assert len(notices) == 1


def test_the_lock_of_a_killed_process_is_free(store: Store) -> None:
    holder = python(HOLDER, store.root, stdin=subprocess.PIPE)
    assert line_of(holder) == "held"
    holder.kill()
    holder.communicate()
    notices: list[object] = []
    with store.measuring_lock(notices.append):
        pass
    assert notices == []


def test_the_lock_may_be_nested_in_a_thread_but_not_shared_by_two(store: Store) -> None:
    entered = threading.Event()

    def other() -> None:
        with store.measuring_lock():
            entered.set()

    thread = threading.Thread(target=other)
    with store.measuring_lock():
        with store.measuring_lock():
            pass
        thread.start()
        assert not entered.wait(0.4)  # The inner one gave nothing away.
    assert entered.wait(20)
    thread.join()
