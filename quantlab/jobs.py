"""The queue of comparisons as pages use it: submit, watch, cancel.

What there is to know lies in the store, so every queue object on the same store, in this process
or another, now or after a restart, tells the same. One that was started also sees that the work
is done (`supervisor`), in a process of its own for each run (`worker`).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from quantlab import waiting
from quantlab.errors import JobError, StorageError
from quantlab.progress import JobView, RunProgress, VariantView, job_view, plain_title
from quantlab.results import ResultRecord
from quantlab.runs import Kind
from quantlab.store import Store
from quantlab.supervisor import Supervisor
from quantlab.types import RunSpec, VariantSpec

__all__ = ["JobQueue", "JobView", "VariantView"]

_FOLLOWED = 32


@dataclass
class _Followed:
    """What a view remembers of a run, so that the next one reads only what is new."""

    progress: RunProgress
    mark: int
    records: list[ResultRecord]


class JobQueue:
    """The runs waiting and running in `store`. May be used from any thread.

    `title` names a variant in messages (pages give the methods' own titles). `pipeline` is the
    module whose `compare`, `answer` and `environment` the worker calls.
    Raises: JobError for a run that does not exist, StorageError when the store is in trouble.
    """

    def __init__(
        self,
        store: Store,
        *,
        title: Callable[[VariantSpec], str] = plain_title,
        pipeline: str = "quantlab.pipeline",
    ) -> None:
        self._store = store
        self._title = title
        self._supervisor = Supervisor(store, pipeline)
        self._followed: OrderedDict[str, _Followed] = OrderedDict()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to work, first on what an earlier app left; one app a store works at a time."""
        self._supervisor.start()

    def stop(self) -> None:
        """End the worker. Its run waits in the queue again and goes on at the next start."""
        self._supervisor.stop()

    def submit(self, spec: RunSpec, kind: Kind = "compare", parent: str | None = None) -> str:
        """Queue a run and return its id; the id of the same one if that is queued or running.

        With kind 'answer', the variants that finished in `parent` answer `spec.prompts`: those
        named in `spec.variants`, or all of them.
        """
        if kind == "answer":
            spec = self._answering(spec, parent)
        if not spec.variants:
            raise JobError("methods: choose at least one to compare")
        run_id = waiting.enqueue(self._store, spec, kind, parent)
        self._supervisor.wake()
        return run_id

    def cancel(self, run_id: str) -> None:
        """Take a run out of the queue, or end it within two seconds; an ended one stays."""
        here = self._supervisor.cancel(run_id)
        try:
            waiting.request_cancel(self._store, run_id)
        except StorageError:
            if not here:  # With a full disk the word goes round by memory alone.
                raise

    def active(self) -> str | None:
        """The run that is being worked on."""
        return waiting.running(self._store)

    def waiting(self) -> list[str]:
        """The runs in the queue, next one first."""
        return waiting.queued(self._store)

    def view(self, run_id: str) -> JobView:
        """The run as it stands; cheap, as it reads only what is new since the last call."""
        with self._lock, self._store.database.transaction(write=False):
            run = self._store.run_head(run_id)
            followed = self._followed.pop(run_id, None)
            if followed is None:
                labels = [variant.label for variant in run.spec.variants]
                followed = _Followed(RunProgress(labels), 0, [])
            self._followed[run_id] = followed
            while len(self._followed) > _FOLLOWED:
                self._followed.popitem(last=False)
            progress = followed.progress
            progress.read(
                self._store.timed_events(run_id, progress.seen),
                waiting.attempt_after(self._store, run_id),
            )
            mark = self._store.records_mark(run_id)
            if mark != followed.mark:
                followed.mark, followed.records = mark, self._store.records(run_id)
            run = run.with_records(followed.records)
            position = 0
            if run.status == "queued":
                queue = self.waiting()
                position = queue.index(run_id) + 1 if run_id in queue else 0
            cancelling = waiting.cancel_requested(self._store, run_id)
        ending = self._supervisor.unsaved.get(run_id)
        if ending is not None:
            run = replace(run, status=ending.status, error=ending.error)
            run = run.with_records([*followed.records, *ending.records])
        return job_view(
            run,
            progress,
            position=position,
            cancelling=cancelling,
            now=time.time(),
            title=self._title,
        )

    def _answering(self, spec: RunSpec, parent: str | None) -> RunSpec:
        if parent is None:
            raise JobError("answers need the comparison whose variants shall answer")
        if not spec.prompts:
            raise JobError("prompts: write at least one")
        run = self._store.run(parent)
        finished = {record.variant for record in run.records if record.status == "finished"}
        wanted = spec.variants or run.spec.variants
        variants = tuple(variant for variant in wanted if variant.label in finished)
        if not variants:
            raise JobError(f"no variant of run {parent} has finished yet, so none can answer")
        return replace(spec, variants=variants)
