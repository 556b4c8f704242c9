"""Everything measured of one prepared variant, in one place and one order."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from quantlab.answers import answer_prompts, spelled
from quantlab.errors import MethodError
from quantlab.metrics.memory import peak_rss_bytes, reset_peak
from quantlab.metrics.quality import Reference, measure_quality
from quantlab.models import ModelSource
from quantlab.peer_run import check_result
from quantlab.prepared import Prepared
from quantlab.results import NOTHING_FINITE, ResultRecord
from quantlab.types import Emit, Progress, RunSpec, VariantSpec
from quantlab.variants import open_runner


def measure(
    blank: ResultRecord,
    variant: VariantSpec,
    prepared: Prepared,
    source: ModelSource,
    tokenizer: Any,
    windows: list[Tensor],
    bos: int | None,
    reference: Reference | None,
    spec: RunSpec,
    emit: Emit,
) -> ResultRecord:
    """`blank` with quality, speed, memory and answers filled in, status finished.

    Raises: MethodError when the variant gives no finite perplexity, or a peer broke the model.
    """
    label = variant.label
    reset_peak()
    runner = open_runner(variant, prepared, source, bos, spec)
    try:
        quality = measure_quality(runner, windows, reference, label, emit)
        if quality.perplexity is None:
            raise MethodError(
                f"{NOTHING_FINITE}: its perplexity is not a number",
                "use more bits, smaller groups, or another calibration text",
            )
        check_result(prepared, quality.perplexity, reference, windows)
        emit(Progress(label, "speed", 0, 1, 0.0))
        speed = runner.speed()
        outputs = answer_prompts(
            *(runner.session, tokenizer, spec.prompts, spec.max_new_tokens, label, emit),
            stop_strings=spec.stop_strings,
        )
        return dataclasses.replace(
            blank,
            status="finished",
            **dataclasses.asdict(quality) | {"reading": spelled(quality.reading, tokenizer)},
            size_bytes=prepared.size_bytes,
            bits_per_weight=8 * prepared.size_bytes / prepared.parameters,
            quantize_seconds=prepared.seconds,
            peak_rss_bytes=max(
                peak_rss_bytes() + runner.other_peak_bytes(), prepared.peak_rss or 0
            ),
            **({} if speed is None else dataclasses.asdict(speed)),
            kernel=runner.kernel,
            execution=runner.execution,
            fallbacks=prepared.fallbacks + runner.fallbacks,
            curves=prepared.curves,
            outputs=outputs,
            details=prepared.details,
        )
    finally:
        runner.close()
