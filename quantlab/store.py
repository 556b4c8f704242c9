"""Everything that outlives a process: runs, their records and events, cached results, artifacts.

One folder holds it all: `quantlab.sqlite` (see `database`) and `artifacts/<key>/`. Pages, workers
and the command line use it at the same time. Only finished results are cached, by content key.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantlab import artifacts
from quantlab.database import Database, storage_errors
from quantlab.errors import JobError
from quantlab.locks import measuring_lock
from quantlab.paths import home
from quantlab.processes import process_identity
from quantlab.results import ResultRecord
from quantlab.runs import ACTIVE, COLUMNS, Kind, Run, RunStatus, head_from_row, record_from_row
from quantlab.types import Emit, Event, RunSpec, ignore
from quantlab.votes import Vote

__all__ = ["KEEP_ARTIFACT_BYTES", "Run", "Store", "home", "storage_errors"]

KEEP_ARTIFACT_BYTES = 8 * 10**9


class Store:
    """The store in `root` (default `home()`), made if it is not there.

    Every method raises StorageError when the disk is full, the database is damaged or the folder
    cannot be written, and JobError when a named run does not exist.
    """

    def __init__(
        self, root: Path | None = None, *, keep_artifact_bytes: int = KEEP_ARTIFACT_BYTES
    ) -> None:
        self.root = (home() if root is None else Path(root)).expanduser().absolute()
        self.database = Database(self.root / "quantlab.sqlite")
        self._artifacts = self.root / "artifacts"
        self._keep_artifact_bytes = keep_artifact_bytes
        self._in_use: set[str] = set()

    def close(self) -> None:
        """Close the database; any later call opens it again."""
        self.database.close()

    def measuring_lock(self, emit: Emit = ignore) -> AbstractContextManager[None]:
        """Hold this while measuring: one process at a time for each store, the others wait.

        A wait is told with a Notice that names the process. Nesting within a thread is fine, and
        the system releases the lock when its holder dies.
        """
        return measuring_lock(self.root / "measuring.lock", emit)

    # Cached results and artifacts

    def cached(self, key: str) -> ResultRecord | None:
        """The finished record saved under this content key. Its artifact may have been pruned."""
        with self.database.transaction(write=False) as db:
            row = db.execute("SELECT record FROM results WHERE key = ?", (key,)).fetchone()
        try:
            record = None if row is None else ResultRecord.from_json(json.loads(row[0]))
        except (TypeError, KeyError, ValueError):
            return None  # Written by another version: measure it again.
        if record is not None and record.artifact is not None:
            self._in_use.add(Path(record.artifact).name)
            artifacts.touch(self._artifacts / Path(record.artifact).name)
        return record

    def save(self, key: str, record: ResultRecord) -> None:
        """Keep a record under its content key; one that is not finished is not cached."""
        if record.status != "finished":
            return
        with self.database.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO results VALUES (?, ?, ?)",
                (key, json.dumps(record.to_json()), time.time()),
            )
        self.prune_artifacts()

    def artifact(self, key: str) -> Path:
        """The folder of an artifact, counted as used now: its parent exists, itself maybe not."""
        path = artifacts.artifact_path(self._artifacts, key)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.touch(path)
        self._in_use.add(key)
        return path

    def prune_artifacts(self, keep_bytes: int | None = None) -> int:
        """Remove least recently used artifacts beyond `keep_bytes` (default: the store's cap).

        Returns the bytes removed. Called after every `save`.

        Kept whatever their size: those this process has asked for, and those of runs that are
        queued or running and of the comparisons that such runs answer for.
        """
        with self.database.transaction(write=False) as db:
            rows = db.execute(
                "SELECT record FROM records JOIN runs ON runs.id = run_id"
                " WHERE runs.status IN ('queued', 'running') OR runs.id IN"
                " (SELECT parent FROM runs WHERE status IN ('queued', 'running'))"
            ).fetchall()
        named = {json.loads(row[0]).get("artifact") for row in rows} - {None}
        protected = self._in_use | {Path(name).name for name in named}
        limit = self._keep_artifact_bytes if keep_bytes is None else keep_bytes
        return artifacts.prune(self._artifacts, limit, protected)

    # Runs

    def create_run(self, spec: RunSpec, kind: Kind = "compare", parent: str | None = None) -> str:
        """A new run of this process's own, status queued. `JobQueue.submit` is for the queue."""
        now = time.time()
        run_id = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{secrets.token_hex(3)}"
        with self.database.transaction() as db:
            if parent is not None:
                self._require(db, parent)
            db.execute(
                f"INSERT INTO runs ({COLUMNS}, owner)"
                " VALUES (?, ?, ?, 'queued', NULL, ?, NULL, NULL, '{}', ?, ?)",
                (run_id, kind, spec.dumps(), now, parent, process_identity()),
            )
        return run_id

    def update_run(
        self,
        run_id: str,
        *,
        status: RunStatus | None = None,
        error: str | None = None,
        started: float | None = None,
        ended: float | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        """Change what is given. A new status also stamps `started` or `ended` where still empty."""
        now = time.time()
        if status == "running" and started is None:
            started = self.run_head(run_id).started or now
        if status in ("finished", "failed", "cancelled") and ended is None:
            ended = now
        changes = {
            "status": status,
            "error": None if error is None else _storable(error),
            "started": started,
            "ended": ended,
            "environment": None if environment is None else json.dumps(dict(environment)),
        }
        with self.database.transaction() as db:
            self._require(db, run_id)
            for column, value in changes.items():
                if value is not None:
                    db.execute(f"UPDATE runs SET {column} = ? WHERE id = ?", (value, run_id))

    def add_record(self, run_id: str, record: ResultRecord) -> None:
        """Add a variant's record to a run, in place of an earlier one of the same variant."""
        with self.database.transaction() as db:
            self._require(db, run_id)
            db.execute(
                "INSERT OR REPLACE INTO records (run_id, variant, record) VALUES (?, ?, ?)",
                (run_id, record.variant, json.dumps(record.to_json())),
            )

    def run(self, run_id: str) -> Run:
        """A run with its records. Raises: JobError if there is none."""
        with self.database.transaction(write=False):
            head = self.run_head(run_id)
            return head.with_records(self.records(run_id))

    def runs(self, limit: int = 100) -> list[Run]:
        """The latest runs, newest first."""
        with self.database.transaction(write=False) as db:
            rows = db.execute(
                f"SELECT {COLUMNS} FROM runs ORDER BY seq DESC LIMIT ?", (limit,)
            ).fetchall()
            return [head_from_row(row).with_records(self.records(row[0])) for row in rows]

    def delete_run(self, run_id: str) -> None:
        """Forget a run and the answers to it; cached results stay. Raises: JobError if active."""
        with self.database.transaction() as db:
            doomed = db.execute(
                "SELECT id, status FROM runs WHERE id = ? OR (parent = ? AND kind = 'answer')",
                (run_id, run_id),
            ).fetchall()
            self._require(db, run_id)
            for other, status in doomed:
                if status in ACTIVE:
                    raise JobError(f"run {other} is {status}: cancel it before deleting {run_id}")
            db.executemany("DELETE FROM runs WHERE id = ?", [(row[0],) for row in doomed])

    def run_head(self, run_id: str) -> Run:
        """A run without its records (cheap). Raises: JobError if there is none."""
        with self.database.transaction(write=False) as db:
            row = db.execute(f"SELECT {COLUMNS} FROM runs WHERE id = ?", (run_id,)).fetchone()
        if row is None:
            raise JobError(f"there is no run {run_id!r}; it may have been deleted")
        return head_from_row(row)

    def records(self, run_id: str) -> list[ResultRecord]:
        """The records of a run in the order they came."""
        with self.database.transaction(write=False) as db:
            rows = db.execute(
                "SELECT variant, record FROM records WHERE run_id = ? ORDER BY seq", (run_id,)
            ).fetchall()
        return [record_from_row(variant, text) for variant, text in rows]

    def records_mark(self, run_id: str) -> int:
        """A number that grows whenever a record of the run is added or replaced."""
        with self.database.transaction(write=False) as db:
            row = db.execute(
                "SELECT coalesce(max(seq), 0) FROM records WHERE run_id = ?", (run_id,)
            ).fetchone()
        return int(row[0])

    # Blind votes

    def add_vote(self, run_id: str, vote: Vote) -> None:
        """Keep a blind vote on answers of a comparison (or of answers asked for it later)."""
        with self.database.transaction() as db:
            self._require(db, run_id)
            db.execute(
                "INSERT INTO votes (run_id, prompt, left_variant, right_variant, winner, at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (run_id, _storable(vote.prompt), vote.left, vote.right, vote.winner, time.time()),
            )

    def votes(self, run_id: str) -> list[Vote]:
        """The votes on a comparison, oldest first."""
        with self.database.transaction(write=False) as db:
            rows = db.execute(
                "SELECT prompt, left_variant, right_variant, winner FROM votes"
                " WHERE run_id = ? ORDER BY seq",
                (run_id,),
            ).fetchall()
        return [Vote(*row) for row in rows]

    # Events

    def append_events(self, run_id: str, events: Iterable[Event]) -> None:
        """Add to what happened in a run, in this order."""
        now = time.time()
        rows = [(run_id, now, event.kind, json.dumps(asdict(event))) for event in events]
        with self.database.transaction() as db:
            self._require(db, run_id)
            db.executemany("INSERT INTO events (run_id, at, kind, event) VALUES (?, ?, ?, ?)", rows)

    def events(self, run_id: str, after: int = 0) -> list[tuple[int, dict[str, Any]]]:
        """Events of a run with a number above `after`, oldest first, as (number, fields)."""
        return [(number, event) for number, _, event in self.timed_events(run_id, after)]

    def timed_events(self, run_id: str, after: int = 0) -> list[tuple[int, float, dict[str, Any]]]:
        """`events` with the time (epoch seconds) at which each was stored."""
        with self.database.transaction(write=False) as db:
            rows = db.execute(
                "SELECT id, at, event FROM events WHERE run_id = ? AND id > ? ORDER BY id",
                (run_id, after),
            ).fetchall()
        return [(number, at, json.loads(text)) for number, at, text in rows]

    @staticmethod
    def _require(db: sqlite3.Connection, run_id: str) -> None:
        if db.execute("SELECT 1 FROM runs WHERE id = ?", (run_id,)).fetchone() is None:
            raise JobError(f"there is no run {run_id!r}; it may have been deleted")


def _storable(text: str) -> str:
    """SQLite takes no lone surrogates, which undecodable file names bring along."""
    return text.encode("utf-8", "backslashreplace").decode()
