"""Several variants answer the same prompts side by side, one token each in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from quantlab.answers import Answering, mark_divergence
from quantlab.errors import ModelError, QuantLabError
from quantlab.foreign import adopt
from quantlab.methods import METHODS, configure
from quantlab.models import ModelSource
from quantlab.models.loading import load_tokenizer_of
from quantlab.prepared import Prepared, read_about
from quantlab.results import ResultRecord
from quantlab.runners import Runner
from quantlab.store import Store
from quantlab.types import (
    Emit,
    Generation,
    Progress,
    RunSpec,
    VariantFinished,
    VariantSpec,
    VariantStarted,
)
from quantlab.variants import open_runner


def answer_together(
    records: Sequence[ResultRecord], spec: RunSpec, source: ModelSource, store: Store, emit: Emit
) -> list[ResultRecord]:
    """The records with the answers to `spec.prompts` in place of their earlier outputs.

    All variants are held in memory at once. One that cannot be opened is a failed record.
    """
    tokenizer = load_tokenizer_of(source)
    by_label = {variant.label: variant for variant in spec.variants}
    ordered = sorted(records, key=lambda record: METHODS[record.method].quantizes)
    opened: dict[str, Runner] = {}
    settled: dict[str, ResultRecord] = {}
    with ExitStack() as stack:
        for record in ordered:
            emit(VariantStarted(record.variant))
            try:
                runner = _open(record, by_label[record.variant], source, spec, store)
            except QuantLabError as error:
                settled[record.variant] = dataclasses.replace(
                    record, status="failed", error=str(error), hint=error.hint, outputs=()
                )
                continue
            stack.callback(runner.close)
            opened[record.variant] = runner
        answers: dict[str, list[Generation]] = {label: [] for label in opened}
        for index, prompt in enumerate(spec.prompts):
            # llama.cpp keeps one sequence an engine, so prompts go one after the other.
            running = {
                label: Answering(
                    runner.session,
                    tokenizer,
                    prompt,
                    index,
                    spec.max_new_tokens,
                    label,
                    emit,
                    spec.forced,
                    spec.stop_strings,
                ).steps()
                for label, runner in opened.items()
            }
            for label, generation in in_turn(running, index, spec, emit):
                answers[label].append(generation)
    for record in ordered:
        if record.variant in answers:
            outputs = tuple(answers[record.variant])
            settled[record.variant] = dataclasses.replace(record, outputs=outputs)
    original = _original_answers(settled.values())
    finished = mark_divergence([settled[record.variant] for record in records], original)
    for record in finished:
        emit(VariantFinished(record.variant, record.to_json()))
    return finished


def in_turn(
    running: dict[str, Iterator[Generation | None]], index: int, spec: RunSpec, emit: Emit
) -> Iterator[tuple[str, Generation]]:
    """Advance every answer by one token, again and again; yield each as it is complete."""
    done = 0
    total = len(running) * len(spec.prompts)
    running = dict(running)
    while running:
        for label in list(running):
            generation = next(running[label])
            if generation is not None:
                del running[label]
                done += 1
                finished = index * (total // max(len(spec.prompts), 1)) + done
                emit(Progress(label, "answers", finished, total, finished / max(total, 1)))
                yield label, generation


def _open(
    record: ResultRecord, variant: VariantSpec, source: ModelSource, spec: RunSpec, store: Store
) -> Runner:
    prepared: Prepared | None = Prepared("unquantized", store.root, 0, 1)
    if METHODS[record.method].reads_files:
        prepared = adopt(configure(variant).path, source)
    elif METHODS[record.method].quantizes:
        prepared = read_about(store.artifact(record.artifact)) if record.artifact else None
    if prepared is None:
        raise ModelError(
            f"{record.variant}: its quantized weights are no longer kept",
            "run the comparison again to make them anew",
        )
    return open_runner(variant, prepared, source, None, spec)


def _original_answers(records: Any) -> tuple[Generation, ...]:
    return next((r.outputs for r in records if not METHODS[r.method].quantizes), ())
