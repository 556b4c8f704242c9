"""The whole flow, one page: model and text -> quantize -> measure -> records.

The web page, the command line and the tests all call this; nothing else runs a comparison. What is
asked of one model alone stands in `quantlab.single` and is called from here as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from quantlab import keys
from quantlab.answers import mark_divergence
from quantlab.checks import check_window, needs_calibration, validate
from quantlab.conditions import Calibration, described_environment, environment, read_calibration
from quantlab.environment import default_threads
from quantlab.errors import ModelError, QuantLabError
from quantlab.estimate import estimate
from quantlab.interleave import answer_together
from quantlab.measure import measure
from quantlab.meter import Meter
from quantlab.methods import METHODS, configure
from quantlab.metrics.quality import Reference, reference_states
from quantlab.models import ModelSource, load, locate
from quantlab.results import ResultRecord
from quantlab.single import evaluate, generate, quantize
from quantlab.store import Store, storage_errors
from quantlab.texts import TokenText, tokenize
from quantlab.types import (
    Emit,
    Generation,
    Notice,
    Progress,
    RunSpec,
    VariantFinished,
    VariantSpec,
    VariantStarted,
    ignore,
)
from quantlab.variants import prepare_variant

__all__ = [
    "answer",
    "compare",
    "environment",
    "estimate",
    "evaluate",
    "generate",
    "quantize",
    "validate",
]


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What all variants of a run share."""

    spec: RunSpec
    store: Store
    source: ModelSource
    tokenizer: Any
    windows: list[Tensor]
    text: TokenText
    reference: Reference
    calibration: Calibration | None
    environment: dict[str, Any]


def compare(
    spec: RunSpec,
    *,
    store: Store | None = None,
    emit: Emit = ignore,
    run_id: str | None = None,
    skip: Collection[str] = (),
) -> list[ResultRecord]:
    """Measure every variant; a failed one is a record with its reason, and the others finish.

    `skip` names variants that an earlier worker of run `run_id` settled; they are not returned.
    Raises: ConfigError, ModelError, TextError or StorageError, all before any variant starts.
    """
    validate(spec)
    store = Store() if store is None else store
    with store.measuring_lock(emit):
        with storage_errors(store.root):
            setting = _prepare(spec, store, emit)
        records = _compare_all(setting, emit, run_id, skip)
    labels = [variant.label for variant in spec.variants]
    return sorted(records, key=lambda record: labels.index(record.variant))


def _compare_all(
    setting: _Setting, emit: Emit, run_id: str | None, skip: Collection[str]
) -> list[ResultRecord]:
    """The variants one by one, the unquantized first: the others' answers are compared with its."""
    order = sorted(setting.spec.variants, key=lambda variant: METHODS[variant.method].quantizes)
    original: Sequence[Generation] = ()
    if skip and run_id is not None:
        settled = [r for r in setting.store.run(run_id).records if r.status == "finished"]
        original = next((r.outputs for r in settled if _unquantized(r.method)), ())
    records: list[ResultRecord] = []
    meter = Meter(emit, len(order))
    for meter.index, variant in enumerate(order):
        if variant.label in skip:
            continue
        emit(VariantStarted(variant.label))
        record = _settle(variant, setting, meter)
        if _unquantized(record.method) and not original:
            original = record.outputs
        record = mark_divergence([record], original)[0]
        records.append(record)
        emit(VariantFinished(variant.label, record.to_json()))
    return records


def _unquantized(method: str) -> bool:
    return not METHODS[method].quantizes


def _prepare(spec: RunSpec, store: Store, emit: Emit) -> _Setting:
    """Model, windows and the original's states. Raises what `compare` raises."""
    torch.set_num_threads(spec.threads or default_threads())
    emit(Progress("", "load model", 0, 1, 0.0))
    model = load(
        spec.model, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code
    )
    for note in model.notes:
        emit(Notice(note))
    text = tokenize(model.tokenizer, spec.text, "evaluation")
    windows = text.windows(spec.eval_tokens, spec.window)
    limit = getattr(model.module.config, "max_position_embeddings", None)
    check_window(spec.window, text.bos, limit)
    reference = reference_states(model, windows, text.bos, emit)
    needed = any(needs_calibration(variant, spec) for variant in spec.variants)
    # Only the head of the original stays in memory from here on.
    return _Setting(
        spec,
        store,
        model.source,
        model.tokenizer,
        windows,
        text,
        reference,
        read_calibration(model, spec, emit) if needed else None,
        described_environment(spec, model.source, text, len(windows)),
    )


def _settle(variant: VariantSpec, setting: _Setting, emit: Meter) -> ResultRecord:
    """The variant's record: cached, measured, or failed with its reason."""
    method = METHODS[variant.method]
    config = configure(variant, setting.spec.group_size)
    blank = ResultRecord(
        variant=variant.label,
        method=variant.method,
        bits=method.weight_bits(config),
        config=config.to_json(),
        status="failed",
        activation_bits=method.activation_bits(config),
        environment=setting.environment,
    )
    try:
        return _measure(variant, blank, setting, emit)
    except QuantLabError as error:
        return dataclasses.replace(blank, error=str(error), hint=error.hint)
    except MemoryError:
        return dataclasses.replace(
            blank,
            error="out of memory",
            hint="choose a smaller model, fewer calibration tokens or a smaller window",
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        return dataclasses.replace(blank, error=f"{type(error).__name__}: {reason}")


def _measure(
    variant: VariantSpec, blank: ResultRecord, setting: _Setting, emit: Meter
) -> ResultRecord:
    spec, store = setting.spec, setting.store
    described = dict(blank.environment)
    calibration = setting.calibration if needs_calibration(variant, spec) else None
    if calibration is not None:
        needs = METHODS[variant.method].needs_for(configure(variant, spec.group_size))
        described["calibration"] = calibration.to_json(moments="second_moment" in needs)
    artifact = keys.artifact_key(
        setting.source.fingerprint,
        variant,
        blank.config,
        None if calibration is None else calibration.name,
        None if calibration is None else calibration.ids,
        spec.seed,
        METHODS[variant.method].content(configure(variant, spec.group_size)),
    )
    key = keys.record_key(artifact, spec, setting.windows, described["device"])
    known = store.cached(key)
    if known is not None:
        emit(Notice(f"{variant.label}: measured before with the same inputs and code"))
        return dataclasses.replace(known, variant=variant.label, cached=True)
    with storage_errors(store.root):
        prepared = prepare_variant(
            variant,
            setting.source,
            None if calibration is None else calibration.ids,
            store.artifact(artifact),
            spec,
            emit,
        )
    record = measure(
        dataclasses.replace(blank, environment=described, artifact=artifact),
        variant,
        prepared,
        setting.source,
        setting.tokenizer,
        setting.windows,
        setting.text.bos,
        setting.reference,
        spec,
        emit,
    )
    store.save(key, record)
    return record


def answer(
    records: Sequence[ResultRecord], spec: RunSpec, *, store: Store, emit: Emit = ignore
) -> list[ResultRecord]:
    """The variants of an earlier run answer `spec.prompts`; records with the new outputs.

    Decoded in turn, one token each, so that they stream side by side. A variant whose artifact is
    gone becomes a failed record. Raises: ModelError when the original cannot be loaded.
    """
    torch.set_num_threads(spec.threads or default_threads())
    source = _same_model(records, spec)
    return answer_together(records, spec, source, store, emit)


def _same_model(records: Sequence[ResultRecord], spec: RunSpec) -> ModelSource:
    """The model the records were measured on. Raises: ModelError when it has changed since."""
    source = locate(
        spec.model, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code
    )
    for record in records:
        measured = record.environment.get("model", {}).get("fingerprint", source.fingerprint)
        if measured != source.fingerprint:
            raise ModelError(f"model: {spec.model} has changed since this comparison; run it again")
    return source
