"""The SQLite file behind the store: opening, schema, transactions, and errors in plain words."""

from __future__ import annotations

import errno
import re
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantlab.errors import StorageError
from quantlab.locks import FileLock

BUSY_SECONDS = 30.0
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_NOT_FILES = (ConnectionError, TimeoutError)

# One script for each schema version; PRAGMA user_version says how many a file has seen.
# `queue` has a row only for runs that a supervisor shall run; the command line's runs have none.
MIGRATIONS = (
    """
    CREATE TABLE results (
        key TEXT PRIMARY KEY, record TEXT NOT NULL, saved REAL NOT NULL) STRICT;
    CREATE TABLE runs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL,
        spec TEXT NOT NULL, status TEXT NOT NULL, error TEXT, created REAL NOT NULL,
        started REAL, ended REAL, environment TEXT NOT NULL, owner TEXT NOT NULL,
        parent TEXT REFERENCES runs (id) ON DELETE SET NULL) STRICT;
    CREATE TABLE records (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        variant TEXT NOT NULL, record TEXT NOT NULL, UNIQUE (run_id, variant)) STRICT;
    CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        at REAL NOT NULL, kind TEXT NOT NULL, event TEXT NOT NULL) STRICT;
    CREATE INDEX events_of_run ON events (run_id, id);
    CREATE INDEX children_of_run ON runs (parent);
    CREATE TABLE queue (
        run_id TEXT PRIMARY KEY REFERENCES runs (id) ON DELETE CASCADE,
        cancel INTEGER NOT NULL DEFAULT 0, attempt_after INTEGER NOT NULL DEFAULT 0) STRICT;
    """,
    """
    CREATE TABLE votes (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        prompt TEXT NOT NULL, left_variant TEXT NOT NULL, right_variant TEXT NOT NULL,
        winner TEXT, at REAL NOT NULL) STRICT;
    CREATE INDEX votes_of_run ON votes (run_id, seq);
    """,
    """
    CREATE TABLE labs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, plan TEXT NOT NULL,
        created REAL NOT NULL) STRICT;
    CREATE TABLE lab_runs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        lab_id TEXT NOT NULL REFERENCES labs (id) ON DELETE CASCADE,
        run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        UNIQUE (lab_id, run_id)) STRICT;
    CREATE INDEX labs_of_run ON lab_runs (run_id);
    """,
)

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How Rust names the system's error."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn sqlite3 errors and OSErrors about `path` into StorageError; also for artifact writers.

    Connection errors, and OSErrors that carry no error number of the system, pass as they are.

    Raises: StorageError with one message that says what is wrong and what to do.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = (getattr(error, "sqlite_errorcode", None) or sqlite3.SQLITE_ERROR) & 0xFF
        # A full disk also shows as an I/O error, when the shared-memory file cannot grow.
        full = code == sqlite3.SQLITE_FULL or (
            code == sqlite3.SQLITE_IOERR and _free_bytes(path) < 1 << 20
        )
        raise _full(path) if full else _explained(path, code, error) from error
    except OSError as error:
        if error.errno in FULL_DISK:
            raise _full(path) from error
        # Libraries raise OSError for what is no trouble with files: a missing model, a network.
        if error.errno is None or error.errno <= 0 or isinstance(error, _NOT_FILES):
            raise
        raise StorageError(
            f"{error.filename or path} cannot be read or written: {error.strerror or error}",
            "check the folder's permissions, or point QUANTLAB_HOME at another folder",
        ) from error
    except Exception as error:
        # safetensors writes in Rust and has an exception of its own, also for a full disk.
        number = _OS_ERROR.search(str(error))
        if type(error).__name__ == "SafetensorError" and number and int(number[1]) in FULL_DISK:
            raise _full(path) from error
        raise


def _full(path: Path) -> StorageError:
    return StorageError(
        f"the disk is full: nothing more can be written to {path}; "
        "everything that was finished before is kept",
        "free some space and run it again; finished variants are not measured again",
    )


def _explained(path: Path, code: int, error: sqlite3.DatabaseError) -> StorageError:
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StorageError(
            f"the results database {path} is damaged ({error}); move it away, together with any "
            f"{path.name}-wal and {path.name}-shm beside it, and start again with an empty one",
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StorageError(
            f"the results database {path} was locked by another program for "
            f"{BUSY_SECONDS:.0f} seconds; close that program and try again",
        )
    return StorageError(
        f"the results database {path} cannot be read or written: {error}",
        "check the folder's permissions, or point QUANTLAB_HOME at another folder",
    )


def _free_bytes(path: Path) -> int:
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:
        return 1 << 62


class Database:
    """One connection, shared by the threads of this process one transaction at a time.

    Other processes may use the same file: WAL lets them read while one writes, and a writer waits
    up to `BUSY_SECONDS` for another. Not for use across `fork` without `exec`.
    Raises: StorageError, also at construction (damaged file, no permission, newer schema).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self.transaction(write=False) as db:
            db.execute("SELECT count(*) FROM runs").fetchone()

    @contextmanager
    def transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        """All or nothing; `write=False` gives one consistent snapshot. An inner one joins."""
        with storage_errors(self.path), self._lock:
            if self._connection is None:
                self._connection = self._open()
            db = self._connection
            joins = db.in_transaction
            if joins:
                yield db
                return
            db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield db
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    def close(self) -> None:
        """Close the connection; the next transaction opens a new one."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            # SQLite does not wait when two processes switch a new file to WAL at once.
            with FileLock(self.path.with_name("open.lock")).waiting():
                db.execute("PRAGMA journal_mode = WAL")
                self._migrate(db)
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            db.close()
            raise
        return db

    def _migrate(self, db: sqlite3.Connection) -> None:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise StorageError(
                f"the results database {self.path} was written by a newer QuantLab (schema "
                f"{version}, this one knows {len(MIGRATIONS)}); update QuantLab, or point "
                "QUANTLAB_HOME at another folder",
            )
        for number in range(version, len(MIGRATIONS)):
            db.executescript(
                f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;"
            )
