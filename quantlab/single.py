"""One model by itself: quantized to a file, measured as it is, or answering prompts."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from quantlab.answers import answer_prompts
from quantlab.checks import check_window, needs_calibration, validate
from quantlab.conditions import described_environment, read_calibration
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
from quantlab.environment import default_threads
from quantlab.errors import ConfigError
from quantlab.measure import measure
from quantlab.meter import Meter
from quantlab.models import context_of, load, locate, stream
from quantlab.results import ResultRecord
from quantlab.stops import check_stop_strings
from quantlab.store import storage_errors
from quantlab.texts import tokenize
from quantlab.types import Emit, Generation, RunSpec, VariantSpec, ignore
from quantlab.variants import open_runner, prepare_variant


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
        ids = read_calibration(opened, spec, emit).ids
        del opened
    with storage_errors(out), tempfile.TemporaryDirectory(dir=writable_parent(out)) as folder:
        new, meter = Path(folder) / "new", Meter(emit, 1)
        prepared = prepare_variant(variant, source, ids, new, spec, meter, format)
        return deliver(prepared, out)


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
    check_window(spec.window, text.bos, context_of(source))
    described = described_environment(spec, source, text, len(windows))
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

    Greedy at temperature 0, else sampled with `spec.seed`; each ends before the first of
    `spec.stop_strings`. Raises: ConfigError, ModelError.
    """
    check_stop_strings(spec.stop_strings)
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
                spec.stop_strings,
            )
        )
    finally:
        runner.close()
