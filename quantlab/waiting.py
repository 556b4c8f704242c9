"""The queue of runs in the database: who waits, who runs, and what happened to them.

Each function is one transaction, so that pages, supervisors and workers can call them at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from quantlab.errors import JobError
from quantlab.processes import process_alive
from quantlab.results import ResultRecord
from quantlab.runs import Kind, RunStatus, unmeasured
from quantlab.store import Store
from quantlab.types import RunSpec, VariantFinished

ABANDONED = "the program that ran this comparison ended before it was finished"


def enqueue(store: Store, spec: RunSpec, kind: Kind, parent: str | None) -> str:
    """Queue a run; the same one already queued or running is returned instead."""
    with store.database.transaction() as db:
        same = db.execute(
            "SELECT id FROM runs JOIN queue ON run_id = id WHERE spec = ? AND kind = ?"
            " AND parent IS ? AND status IN ('queued', 'running') AND cancel = 0",
            (spec.dumps(), kind, parent),
        ).fetchone()
        if same is not None:
            return str(same[0])
        run_id = store.create_run(spec, kind, parent)
        db.execute("INSERT INTO queue (run_id) VALUES (?)", (run_id,))
        return run_id


def queued(store: Store) -> list[str]:
    """The runs that wait, next one first."""
    with store.database.transaction(write=False) as db:
        rows = db.execute(
            "SELECT id FROM runs JOIN queue ON run_id = id WHERE status = 'queued' ORDER BY seq"
        ).fetchall()
    return [row[0] for row in rows]


def running(store: Store) -> str | None:
    """The run that a supervisor has taken from the queue."""
    with store.database.transaction(write=False) as db:
        row = db.execute(
            "SELECT id FROM runs JOIN queue ON run_id = id WHERE status = 'running' ORDER BY seq"
        ).fetchone()
    return None if row is None else str(row[0])


def claim(store: Store) -> str | None:
    """Take the next run: its status becomes running. None when nothing waits."""
    with store.database.transaction():
        waiting = queued(store)
        if not waiting:
            return None
        store.update_run(waiting[0], status="running")
        return waiting[0]


def requeue(store: Store) -> None:
    """What was running waits again, before everything submitted later."""
    with store.database.transaction() as db:
        db.execute(
            "UPDATE runs SET status = 'queued' WHERE status = 'running'"
            " AND id IN (SELECT run_id FROM queue)"
        )


def fail_abandoned(store: Store) -> None:
    """Runs outside the queue whose process is gone (a killed command line) become failed."""
    with store.database.transaction() as db:
        rows = db.execute(
            "SELECT id, owner FROM runs WHERE status IN ('queued', 'running')"
            " AND id NOT IN (SELECT run_id FROM queue)"
        ).fetchall()
        for run_id, owner in rows:
            if not process_alive(owner):
                store.update_run(run_id, status="failed", error=ABANDONED)


def request_cancel(store: Store, run_id: str) -> None:
    """Cancel a waiting run at once, or ask for the end of a running one; an ended one stays.

    Raises: JobError for a run that another program runs outside the queue.
    """
    with store.database.transaction() as db:
        run = store.run(run_id)
        changed = db.execute("UPDATE queue SET cancel = 1 WHERE run_id = ?", (run_id,)).rowcount
        if run.status == "running" and not changed:
            raise JobError(f"run {run_id} was started from a command line; stop it there")
        if run.status == "queued":
            end(store, run_id, "cancelled", None, cancelled_records(store, run_id))


def cancel_requested(store: Store, run_id: str) -> bool:
    with store.database.transaction(write=False) as db:
        row = db.execute("SELECT cancel FROM queue WHERE run_id = ?", (run_id,)).fetchone()
    return row is not None and bool(row[0])


def cancelled_records(store: Store, run_id: str) -> list[ResultRecord]:
    """A cancelled record for each variant that has none yet."""
    return [unmeasured(v, "cancelled", None) for v in store.run(run_id).unsettled]


def begin_attempt(store: Store, run_id: str) -> int:
    """A fresh worker begins: events above the returned number are its own."""
    with store.database.transaction() as db:
        last = db.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()[0]
        db.execute("UPDATE queue SET attempt_after = ? WHERE run_id = ?", (last, run_id))
    return int(last)


def attempt_after(store: Store, run_id: str) -> int:
    """The number after which the current worker's events begin (0 without a worker)."""
    with store.database.transaction(write=False) as db:
        row = db.execute("SELECT attempt_after FROM queue WHERE run_id = ?", (run_id,)).fetchone()
    return 0 if row is None else int(row[0])


def add_records(store: Store, run_id: str, records: Sequence[ResultRecord]) -> None:
    """Add records together with the events that tell of them."""
    with store.database.transaction():
        for record in records:
            store.add_record(run_id, record)
        store.append_events(
            run_id, [VariantFinished(record.variant, record.to_json()) for record in records]
        )


def end(
    store: Store,
    run_id: str,
    status: RunStatus,
    error: str | None,
    records: Sequence[ResultRecord] = (),
) -> None:
    """End a run with these last records, and drop the progress events nobody needs any more."""
    with store.database.transaction() as db:
        add_records(store, run_id, records)
        store.update_run(run_id, status=status, error=error, ended=time.time())
        latest: dict[str, int] = {}
        furthest = (0.0, 0)
        for number, event in store.events(run_id):
            if event["kind"] == "progress":
                latest[event["variant"]] = number
                furthest = max(furthest, (event["fraction"], number))
        kept = {*latest.values(), furthest[1]}
        db.execute(
            "DELETE FROM events WHERE run_id = ? AND kind = 'progress'"
            f" AND id NOT IN ({','.join(map(str, kept))})",
            (run_id,),
        )
