"""A pipeline for the tests of the queue: what a variant does is the name of its method.

Each start of a variant is a line in the file $FAKE_LOG, with the worker's process id.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from quantlab.errors import Cancelled, ModelError
from quantlab.results import ResultRecord
from quantlab.store import Store
from quantlab.types import (
    Emit,
    Generation,
    Notice,
    OutputDelta,
    Progress,
    RunSpec,
    VariantFinished,
    VariantSpec,
    VariantStarted,
)

WORDS = ("one ", "two ", "three")


def environment(spec: RunSpec) -> dict[str, Any]:
    return {"machine": "fake", "seed": spec.seed}


def log(text: str) -> None:
    with Path(os.environ["FAKE_LOG"]).open("a") as file:
        file.write(f"{text} {os.getpid()}\n")


def record_of(variant: VariantSpec, **fields: Any) -> ResultRecord:
    values: dict[str, Any] = {"bits": variant.bits or 16, "config": {}, "status": "finished"}
    return ResultRecord(variant=variant.label, method=variant.method, **(values | fields))


def compare(
    spec: RunSpec,
    *,
    store: Store,
    emit: Emit,
    run_id: str | None = None,
    skip: Collection[str] = (),
) -> list[ResultRecord]:
    if spec.model == "missing":
        raise ModelError("model: there is no 'missing'", "try bundled")
    if spec.model == "deadly":
        log("load")
        os.kill(os.getpid(), signal.SIGKILL)
    emit(Notice(f"threads: {spec.threads}"))
    records = []
    for place, variant in enumerate(spec.variants):
        if variant.label in skip:
            continue
        log(variant.label)
        emit(VariantStarted(variant.label))
        emit(Progress(variant.label, "quantize", 1, 4, place / len(spec.variants)))
        options = dict(variant.options)
        act(variant.method, str(options.get("file", "")), variant, emit)
        record = record_of(variant, perplexity=20.0 + place)
        records.append(record)
        if variant.method == "silent":
            continue  # The worker has to take the record from the list.
        if variant.method == "lost":
            records.pop()
            continue
        emit(VariantFinished(variant.label, record.to_json()))
    return records


def act(method: str, file: str, variant: VariantSpec, emit: Emit) -> None:
    if method == "gate":
        while not Path(file).exists():
            time.sleep(0.02)
    elif method == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        forever(file)
    elif method == "parent":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        forever(file, child.pid)
    elif method == "hang":
        forever(file)
    elif method == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif method == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif method == "exit":
        print("the last words", file=sys.stderr)
        sys.stderr.flush()
        os._exit(7)
    elif method == "raise":
        raise RuntimeError("boom")
    elif method == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)
    elif method == "gives_up":
        raise Cancelled("cancelled")
    elif method == "flood":
        for stream in (sys.stdout, sys.stderr):
            stream.write("x" * 5_000_000)
            stream.flush()
    elif method == "talk":
        for word in WORDS:
            emit(OutputDelta(variant.label, 1, word))
        while file and not Path(file).exists():
            time.sleep(0.02)


def forever(file: str, pid: int = 0) -> None:
    """Say in `file` which process is here, then stay."""
    Path(f"{file}.part").write_text(str(pid or os.getpid()))
    Path(f"{file}.part").rename(file)
    while True:
        time.sleep(60)


def answer(
    records: list[ResultRecord], spec: RunSpec, *, store: Store, emit: Emit
) -> list[ResultRecord]:
    answers = []
    for record in records:
        log(f"answer-{record.variant}")
        emit(VariantStarted(record.variant))
        outputs = []
        for place, prompt in enumerate(spec.prompts):
            text = f"{record.variant} on {prompt}"
            emit(OutputDelta(record.variant, place, text))
            outputs.append(Generation(prompt, f"{text}.", (1,), (text,)))
        answers.append(
            ResultRecord.from_json(record.to_json() | {"outputs": [o.to_json() for o in outputs]})
        )
    return answers
