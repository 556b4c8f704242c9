"""The whole flow, one page: model and text -> quantize -> measure -> records.

The web page, the command line and the tests all call this; nothing else runs a comparison.
"""

from __future__ import annotations

import dataclasses
import datetime
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab import keys
from quantlab.answers import answer_prompts, mark_divergence
from quantlab.delivery import (
    blank_record,
    check_fit,
    check_format,
    check_out,
    deliver,
    open_as_is,
    writable_parent,
)
from quantlab.engine import Sampler
from quantlab.environment import default_threads, machine, network_available, resolve_device
from quantlab.errors import ConfigError, ModelError, QuantLabError
from quantlab.estimate import estimate
from quantlab.interleave import answer_together
from quantlab.measure import measure
from quantlab.meter import Meter
from quantlab.methods import METHODS, configure
from quantlab.metrics.quality import Reference, reference_states
from quantlab.models import LoadedModel, ModelSource, context_of, get_block, load, locate, stream
from quantlab.results import ResultRecord
from quantlab.store import Store, storage_errors
from quantlab.texts import TokenText, calibration_ids, check_text, tokenize
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
from quantlab.variants import open_runner, prepare_variant

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


def validate(spec: RunSpec) -> None:
    """Refuse what cannot work, before anything starts; cheap.

    Raises: ConfigError, ModelError or TextError, one message each.
    """
    if not spec.variants:
        raise ConfigError("methods: name at least one, for example bf16,rtn:4,gptq:4")
    labels = [variant.label for variant in spec.variants]
    for variant in spec.variants:
        if labels.count(variant.label) > 1:
            raise ConfigError(f"methods: {variant.label} is named twice")
        METHODS[variant.method].check(configure(variant, spec.group_size))
    for name, least in (
        ("group_size", 1),
        ("calibration_tokens", 1),
        ("calibration_length", 8),
        ("window", 8),
        ("max_new_tokens", 1),
        ("threads", 0),
    ):
        if getattr(spec, name) < least:
            raise ConfigError(f"{name}: {getattr(spec, name)}; needs at least {least}")
    if spec.eval_tokens < spec.window:
        raise ConfigError(
            f"eval_tokens: {spec.eval_tokens} is less than one window ({spec.window})"
        )
    resolve_device(spec.device)
    check_text(spec.text, "evaluation", spec.window)
    if any(needs_calibration(variant, spec) for variant in spec.variants):
        check_text(spec.calibration, "calibration", spec.calibration_length)
    locate(spec.model, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code)


def needs_calibration(variant: VariantSpec, spec: RunSpec) -> bool:
    """Whether this variant, with these options, reads calibration text."""
    return bool(METHODS[variant.method].needs_for(configure(variant, spec.group_size)))


def environment(spec: RunSpec) -> dict[str, Any]:
    """Machine, versions and settings a run is measured under."""
    return {
        **machine(),
        "threads": spec.threads or default_threads(),
        "device": resolve_device(spec.device),
        "network": network_available(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": spec.seed,
    }


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Token ids int64 [pieces, length], what they came from, and the linear of a block with the
    widest input, whose second moment has full rank only with as many tokens as channels."""

    ids: Tensor
    name: str
    sha256: str
    widest_layer: str
    widest_input: int

    def to_json(self, *, moments: bool) -> dict[str, Any]:
        """The widest input only for a method that reads second moments."""
        tokens, length = self.ids.numel(), self.ids.shape[1]
        read = {"name": self.name, "sha256": self.sha256, "tokens": tokens, "length": length}
        widest = {"widest_layer": self.widest_layer, "widest_input": self.widest_input}
        return read | widest if moments else read


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
    _check_window(spec.window, text.bos, limit)
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
        _calibration(model, spec, emit) if needed else None,
        _described(spec, model.source, text, len(windows)),
    )


def _described(spec: RunSpec, source: ModelSource, text: TokenText, windows: int) -> dict[str, Any]:
    """The environment of a record: machine, model and text by their hashes."""
    return {
        **environment(spec),
        "model": {"name": spec.model, "fingerprint": source.fingerprint},
        "text": {"name": spec.text, "sha256": text.sha256, "windows": windows},
        "window": spec.window,
        "eval_tokens": windows * spec.window,
    }


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


def _calibration(model: LoadedModel, spec: RunSpec, emit: Emit) -> Calibration:
    length = spec.calibration_length
    ids, sha256 = calibration_ids(
        model, spec.calibration, spec.calibration_tokens, length, spec.seed, emit
    )
    if ids.numel() < spec.calibration_tokens // length * length:
        emit(Notice(f"the calibration text gave {ids.numel()} tokens, fewer than asked for"))
    linears = get_block(model.module, model.family, 0).linears
    widest = max(linears, key=lambda path: linears[path].in_features)
    return Calibration(ids, spec.calibration, sha256, widest, linears[widest].in_features)


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


def quantize(
    spec: RunSpec, variant: VariantSpec, out: Path, format: str = "quantlab", emit: Emit = ignore
) -> Path:
    """Quantize and write: a folder in the `format` named, or a .gguf file. Returns what was
    written.

    `spec` gives model, calibration, group size, threads and seed. Raises: ConfigError, ModelError,
    TextError, StorageError.
    """
    check_format(variant, format, spec.group_size)
    check_out(out, format)
    spec = dataclasses.replace(spec, variants=(variant,), eval_tokens=spec.window)
    validate(spec)
    torch.set_num_threads(spec.threads or default_threads())
    source = locate(
        spec.model, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code
    )
    check_fit(variant, format, source, spec)
    ids = None
    if needs_calibration(variant, spec):
        # Only a text that the model writes itself needs all of it in memory.
        opened = (load if spec.calibration == "self" else stream)(
            source, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code
        )
        ids = _calibration(opened, spec, emit).ids
        del opened
    with storage_errors(out), tempfile.TemporaryDirectory(dir=writable_parent(out)) as folder:
        new, meter = Path(folder) / "new", Meter(emit, 1)
        prepared = prepare_variant(variant, source, ids, new, spec, meter, format)
        return deliver(prepared, out)


def _check_window(window: int, bos: int | None, limit: int | None) -> None:
    """Raise ConfigError for a window (and its begin token) longer than the model's context."""
    if limit is not None and window + (bos is not None) > limit:
        begin = " with its begin token" if bos is not None else ""
        raise ConfigError(f"window: {window}{begin} is more than the model's context of {limit}")


def evaluate(spec: RunSpec, emit: Emit = ignore) -> tuple[dict[str, Any], ResultRecord]:
    """Measure one model as it is: unquantized (bfloat16), a quantlab folder or a .gguf file.

    Returns the environment and a record without KL divergence, since there is no original to
    compare with. Raises: ConfigError, ModelError, TextError.
    """
    variant, prepared, source, tokenizer = open_as_is(spec)
    validate(dataclasses.replace(spec, variants=(VariantSpec("bf16"),)))
    torch.set_num_threads(spec.threads or default_threads())
    text = tokenize(tokenizer, spec.text, "evaluation")
    windows = text.windows(spec.eval_tokens, spec.window)
    _check_window(spec.window, text.bos, context_of(source))
    described = _described(spec, source, text, len(windows))
    blank = blank_record(variant, prepared, described)
    record = measure(
        blank,
        variant,
        prepared,
        source,
        tokenizer,
        windows,
        text.bos,
        None,
        spec,
        Meter(emit, 1),
    )
    return described, record


def generate(
    spec: RunSpec, *, temperature: float = 0.0, top_p: float = 1.0, emit: Emit = ignore
) -> list[Generation]:
    """Answers of one model (as `evaluate` takes it) to `spec.prompts`, streamed as OutputDelta.

    Greedy at temperature 0, else sampled with `spec.seed`. Raises: ConfigError, ModelError.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError("temperature: needs at least 0; top_p: needs more than 0, at most 1")
    variant, prepared, source, tokenizer = open_as_is(spec)
    torch.set_num_threads(spec.threads or default_threads())
    runner = open_runner(variant, prepared, source, None, spec)
    sampler = Sampler(temperature, top_p, spec.seed)
    try:
        return list(
            answer_prompts(
                lambda _: runner.session(sampler),
                tokenizer,
                spec.prompts,
                spec.max_new_tokens,
                variant.label,
                emit,
            )
        )
    finally:
        runner.close()
