"""The store and the job queue behind the page: one of each a process, made when first needed."""

from __future__ import annotations

import atexit
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

from quantlab import pipeline, precomputed
from quantlab.errors import JobError
from quantlab.jobs import JobQueue, JobView
from quantlab.plots import palette
from quantlab.progress import RunProgress, job_view
from quantlab.runs import ACTIVE, Run
from quantlab.store import Store
from quantlab.types import RunSpec, VariantSpec

_LOCK = threading.Lock()
HISTORY = 100
"""Runs that the page lists, newest first."""


def title(variant: VariantSpec) -> str:
    return palette.variant_label(variant.label)


@dataclass
class Services:
    """What the tabs work with. `history` is read again only when something has changed."""

    store: Store
    queue: JobQueue
    _mark: object = None
    _history: tuple[Run, ...] = ()

    def history(self, *, fresh: bool = False) -> tuple[Run, ...]:
        """The latest runs, newest first, with their records.

        Reading them all is too slow to do twice a second, so it happens when the queue has
        changed, or when `fresh` is asked for (a tab was opened, a run deleted).
        """
        mark = (self.queue.active(), tuple(self.queue.waiting()))
        with _LOCK:
            if fresh or mark != self._mark:
                self._history = tuple(self.store.runs(HISTORY))
                self._mark = mark
            return self._history

    def answers(self, run_id: str, *, forced: bool = False) -> list[Run]:
        """The runs that answered further prompts for a comparison, newest first; those with
        `forced` tokens are apart, as nobody would have answered so unforced."""
        return [
            run
            for run in self.history()
            if run.kind == "answer" and run.parent == run_id and bool(run.spec.forced) == forced
        ]

    def answers_to(self, run_id: str) -> list[str]:
        """Ids of the runs that answered further prompts for a comparison, newest first."""
        return [run.id for run in self.answers(run_id)]

    def first_in_view(self, wanted: str) -> str:
        """The run a fresh page shows: the one its address names, else what runs, else the newest.

        '' when there is none: the page then shows the precomputed comparison.
        """
        known = self.history(fresh=True)
        if wanted and self.known(wanted):
            return self.comparison_of(wanted)
        active = self.queue.active()
        if active is not None and self.store.run_head(active).kind != "lab":
            return self.comparison_of(active)
        waiting = [run for run in known if run.status in ACTIVE and run.kind != "lab"]
        if waiting:
            return self.comparison_of(waiting[-1].id)
        return next((run.id for run in known if run.kind == "compare"), "")

    def run(self, run_id: str) -> Run:
        """A run with its records; the precomputed one for ''. Raises: JobError for a lost run."""
        return self.store.run(run_id) if run_id else precomputed.run()

    def view(self, run_id: str) -> JobView:
        """The run as it stands; the precomputed one where there is none of this name (any more)."""
        try:
            if run_id:
                return self.queue.view(run_id)
        except JobError:
            pass  # Deleted, here or in another tab.
        return shipped_view()

    def known(self, run_id: str) -> bool:
        """Whether there is such a run."""
        try:
            self.store.run_head(run_id)
        except JobError:
            return False
        return True

    def comparison_of(self, run_id: str) -> str:
        """The comparison a run belongs to: itself, or the parent of answers."""
        if not run_id:
            return ""
        run = self.store.run_head(run_id)
        return run.parent if run.kind == "answer" and run.parent else run.id


@cache
def shipped_view() -> JobView:
    run = precomputed.run()
    progress = RunProgress(variant.label for variant in run.spec.variants)
    return job_view(run, progress, position=0, cancelling=False, now=0.0)


_services: Services | None = None


def services() -> Services:
    """The one `Services` of this process; the first call starts the queue."""
    global _services
    with _LOCK:
        if _services is None:
            store = Store()
            queue = JobQueue(store, title=title)
            queue.start()
            atexit.register(queue.stop)
            _services = Services(store, queue)
        return _services


@cache
def environment() -> dict[str, Any]:
    """This machine, as the pipeline describes it for a default run."""
    return pipeline.environment(RunSpec())
