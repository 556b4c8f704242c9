"""The thread that takes runs from the queue, one at a time, and starts and watches their workers.

One supervisor works for a store at a time, whatever the number of pages open on it: the others
wait for its lock and take over when it is gone. A worker that dies costs the variant it was at; a
fresh one goes on with the rest.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from quantlab import waiting
from quantlab.child import Death, WorkerProcess
from quantlab.errors import QuantLabError, StorageError
from quantlab.locks import FileLock
from quantlab.progress import RunProgress
from quantlab.results import ResultRecord
from quantlab.runs import RunStatus, unmeasured
from quantlab.store import Store
from quantlab.worker import EXPECTED

POLL_SECONDS = 0.1
IDLE_SECONDS = 0.3

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """How a run ended, and its last records."""

    status: RunStatus
    error: str | None
    records: tuple[ResultRecord, ...]


class Supervisor:
    """Runs what is queued in `store` with `pipeline`, the name of a module."""

    def __init__(self, store: Store, pipeline: str) -> None:
        self._store = store
        self._pipeline = pipeline
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._cancelled: set[str] = set()
        self._active: str | None = None
        self._warned = ""
        self.unsaved: dict[str, Ending] = {}
        """How runs ended that the store could not be told of (a full disk); tried again."""

    def start(self) -> None:
        """Start the thread; without effect when it runs."""
        if self._thread is None or not self._thread.is_alive():
            self._stopping.clear()
            self._thread = threading.Thread(target=self._serve, name="supervisor", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the worker and the thread; what ran waits in the queue again."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wake(self) -> None:
        """Look into the queue now."""
        self._wake.set()

    def cancel(self, run_id: str) -> bool:
        """End the run's worker if it is this supervisor's; False if it is not."""
        if self._active != run_id:
            return False
        self._cancelled.add(run_id)
        return True

    def _serve(self) -> None:
        lock = FileLock(self._store.root / "supervisor.lock")
        while not self._stopping.is_set():
            try:
                if lock.acquire():
                    break
            except OSError as error:
                self._warn(f"the queue cannot be locked: {error}")
            self._stopping.wait(IDLE_SECONDS)
        else:
            return
        try:
            recovered = False
            while not self._stopping.is_set():
                try:
                    if not recovered:
                        waiting.requeue(self._store)
                        waiting.fail_abandoned(self._store)
                        recovered = True
                    self._save_unsaved()
                    self._active = waiting.claim(self._store)
                    if self._active is not None:
                        self._run_to_end(self._active)
                        continue
                except QuantLabError as error:
                    self._warn(f"the queue waits: {error}")
                finally:
                    self._active = None
                self._wake.wait(IDLE_SECONDS)
                self._wake.clear()
        finally:
            lock.release()

    def _run_to_end(self, run_id: str) -> None:
        try:
            self._run(run_id)
        except QuantLabError as error:
            self._end(run_id, "failed", _with_hint(str(error), error.hint))
        except Exception as error:
            _log.exception("run %s could not be supervised", run_id)
            self._end(run_id, "failed", f"the run could not be supervised: {error}")
        finally:
            self._cancelled.discard(run_id)

    def _run(self, run_id: str) -> None:
        store = self._store
        unexplained = 0
        while True:
            if self._cancel_requested(run_id):
                return self._end_cancelled(run_id)
            attempt = waiting.begin_attempt(store, run_id)
            death = self._work(run_id)
            open_ = store.run(run_id).unsettled
            if open_ and self._stopping.is_set():
                return waiting.requeue(store)
            if not open_:
                return self._end(run_id, "finished", None)
            if self._cancel_requested(run_id) or death.report.get("type") == "Cancelled":
                return self._end_cancelled(run_id)
            reason, hint = death.explain()
            at = self._running_variant(run_id, attempt)
            if death.code == EXPECTED and death.report:
                reason, hint = death.report["message"], death.report["hint"]
                began = at is not None or len(open_) < len(store.run(run_id).spec.variants)
                failed = [unmeasured(v, "failed", reason, hint) for v in open_ if began]
                return self._end(run_id, "failed", _with_hint(reason, hint), failed)
            if death.code == 0:
                reason, hint = "the worker ended without a result for this variant", None
            unexplained += at is None
            if death.code == 0 or unexplained > 1:
                failed = [unmeasured(v, "failed", reason, hint) for v in open_]
                return self._end(run_id, "finished", None, failed)
            lost = [unmeasured(v, "failed", reason, hint) for v in open_ if v.label == at]
            waiting.add_records(store, run_id, lost)
            if len(lost) == len(open_):
                return self._end(run_id, "finished", None)

    def _work(self, run_id: str) -> Death:
        """Start a worker and wait for its end, which a cancel or `stop` brings about."""
        worker = WorkerProcess(self._store.root, run_id, self._pipeline)
        try:
            while not worker.wait(POLL_SECONDS):
                if self._stopping.is_set() or self._cancel_requested(run_id):
                    break
        finally:
            worker.end()
        return worker.death()

    def _cancel_requested(self, run_id: str) -> bool:
        if run_id in self._cancelled:
            return True
        try:
            return waiting.cancel_requested(self._store, run_id)
        except StorageError:
            return False  # A store in trouble does not end a worker that may well finish.

    def _running_variant(self, run_id: str, attempt: int) -> str | None:
        """The variant that the worker which began at `attempt` was at when it died."""
        progress = RunProgress(v.label for v in self._store.run(run_id).unsettled)
        progress.read(self._store.timed_events(run_id, attempt), attempt)
        return progress.current

    def _end_cancelled(self, run_id: str) -> None:
        records = waiting.cancelled_records(self._store, run_id)
        self._end(run_id, "cancelled", None, records)

    def _end(
        self,
        run_id: str,
        status: RunStatus,
        error: str | None,
        records: Sequence[ResultRecord] = (),
    ) -> None:
        try:
            known = [*self._store.records(run_id), *records]
            if status == "finished" and all(record.status != "finished" for record in known):
                status, error = "failed", f"no variant finished: {known[0].error}"
            waiting.end(self._store, run_id, status, error, records)
        except StorageError as trouble:
            self.unsaved[run_id] = Ending(status, error or str(trouble), tuple(records))

    def _save_unsaved(self) -> None:
        for run_id, ending in list(self.unsaved.items()):
            waiting.end(self._store, run_id, ending.status, ending.error, ending.records)
            del self.unsaved[run_id]

    def _warn(self, message: str) -> None:
        if message != self._warned:  # Trouble is met several times a second.
            self._warned = message
            _log.warning(message)


def _with_hint(message: str, hint: str | None) -> str:
    return message if hint is None else f"{message} ({hint})"
