"""The process of one job: `python -m quantlab.worker RUN_ID --home … --parent …`.

Runs the pipeline under the measuring lock and writes what happens into the store. How it ended is
told by its exit code (0, 2 for an error a person can meet, 3 for any other) and one line on
stderr; the supervisor that started it settles the run from there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType, TracebackType

from quantlab.database import FULL_DISK, storage_errors
from quantlab.errors import JobError, QuantLabError
from quantlab.processes import die_with, prefer_as_oom_victim
from quantlab.results import ResultRecord
from quantlab.store import Store
from quantlab.types import Event, OutputDelta, Progress, VariantFinished

FLUSH_SECONDS = 0.15
REPORT = "quantlab-worker-report: "
EXPECTED, UNEXPECTED = 2, 3


class EventWriter:
    """Writes events to the store in small batches; a context, whose end writes the rest.

    Progress of a stage replaces what waits of the same stage, text joins the waiting text of its
    prompt. Everything else is written at once, finished records together with their event.
    `emit` may be called from any thread; it raises StorageError once writing has failed.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self._store = store
        self._run_id = run_id
        self._batch: list[Event] = []
        self._places: dict[tuple[str, str, str | int], int] = {}
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._failure: QuantLabError | None = None
        self._thread = threading.Thread(target=self._flush_often, name="events", daemon=True)
        self.settled: set[str] = set()

    def __enter__(self) -> EventWriter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        try:
            self.flush()
        except QuantLabError as failure:
            if failure is not error:
                raise failure from error

    def emit(self, event: Event) -> None:
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._add(event)
        if not isinstance(event, Progress | OutputDelta):
            self.flush()

    def _add(self, event: Event) -> None:
        if isinstance(event, OutputDelta):
            key: tuple[str, str, str | int] = (event.kind, event.variant, event.prompt)
            place = self._places.get(key)
            if place is not None:
                earlier = self._batch[place]
                assert isinstance(earlier, OutputDelta)
                text = earlier.text + event.text
                self._batch[place] = OutputDelta(event.variant, event.prompt, text)
                return
            self._places[key] = len(self._batch)
        elif isinstance(event, Progress):
            key = (event.kind, event.variant, event.stage)
            place = self._places.get(key)
            if place is not None:
                self._batch[place] = event
                return
            self._places[key] = len(self._batch)
        self._batch.append(event)

    def flush(self) -> None:
        """Write what waits. Raises: StorageError, now and from then on."""
        with self._writing:  # One batch at a time, so that their order stays.
            with self._lock:
                if self._failure is not None:
                    raise self._failure
                batch, self._batch, self._places = self._batch, [], {}
            if not batch:
                return
            try:
                with self._store.database.transaction():
                    for event in batch:
                        if isinstance(event, VariantFinished):
                            record = ResultRecord.from_json(event.record)
                            self._store.add_record(self._run_id, record)
                            self.settled.add(event.variant)
                    self._store.append_events(self._run_id, batch)
            except QuantLabError as failure:
                self._failure = failure
                raise

    def _flush_often(self) -> None:
        while not self._closed.wait(FLUSH_SECONDS):
            try:
                self.flush()
            except QuantLabError:
                return  # The next `emit` raises it where the work is done.


def work(store: Store, run_id: str, pipeline: ModuleType) -> None:
    """Run what is unsettled of a run. Raises what the pipeline raises."""
    run = store.run(run_id)
    with EventWriter(store, run_id) as writer, store.measuring_lock(writer.emit):
        environment = getattr(pipeline, "environment", None)
        if environment is not None:
            store.update_run(run_id, environment=environment(run.spec))
        settled = {record.variant for record in run.records}
        if run.kind == "answer":
            if run.parent is None:
                raise JobError("the comparison that these answers belong to was deleted")
            asked = {variant.label for variant in run.unsettled}
            parents = [r for r in store.records(run.parent) if r.variant in asked]
            records = pipeline.answer(parents, run.spec, store=store, emit=writer.emit)
        else:
            records = pipeline.compare(
                run.spec, store=store, emit=writer.emit, run_id=run_id, skip=settled
            )
        for record in records:
            if record.variant not in settled | writer.settled:
                writer.emit(VariantFinished(record.variant, record.to_json()))


def main(arguments: list[str] | None = None) -> int:
    """Do the job and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m quantlab.worker", description=__doc__)
    parser.add_argument("run_id")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True, help="process to end with")
    parser.add_argument("--pipeline", default="quantlab.pipeline", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    die_with(given.parent)
    prefer_as_oom_victim()
    try:
        store = Store(given.home)
        pipeline = importlib.import_module(given.pipeline)
        try:
            work(store, given.run_id, pipeline)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            with storage_errors(given.home):
                raise
    except QuantLabError as error:
        _report(error)
        return EXPECTED
    except Exception as error:
        traceback.print_exc()
        _report(error)
        return UNEXPECTED
    return 0


def _report(error: Exception) -> None:
    told = {
        "type": type(error).__name__,
        "message": str(error)[:4000],
        "hint": getattr(error, "hint", None),
    }
    print(f"\n{REPORT}{json.dumps(told)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # The results are stored: nothing that native libraries do while unloading may hang or crash.
    os._exit(code)
