"""A queue with real workers that run a fake pipeline (tests/fake_pipeline.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quantlab.jobs import JobQueue
from quantlab.store import Store
from tests.jobs.queueing import TESTS, MakeQueue


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
