"""ResultRecord: what was measured of one variant, and under which conditions.

Schema 1. Every figure is measured; a field that could not be measured is None, never a guess.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantlab.types import Execution, Generation, Status

SCHEMA = 1
NOTHING_FINITE = "the quantized model predicts nothing finite"
"""How the error of a record without a finite perplexity begins."""


@dataclass(frozen=True)
class ResultRecord:
    """One variant of one run.

    Units: `perplexity` exp(mean nats a token); `kl_divergence` mean nats a token of
    KL(original || variant); `top1_agreement` a fraction; `size_bytes` of all weights on disk
    (embeddings and norms included); `bits_per_weight` = 8 * size_bytes / parameters;
    `*_ci` a 95% interval (low, high). `segments` holds, for each segment of evaluation tokens, the
    mean negative log-likelihood (`nll`) and KL divergence (`kl`), from which paired intervals are
    drawn. `execution` is 'packed' (real kernels on packed weights) or 'simulated' (dequantized
    arithmetic); a simulated row has no speed. `fallbacks` lists every fallback that was taken.
    `details` is what the method reports of its own work, by name (mixed: `allocation`, see
    `quantlab.methods.mixed`); records from before it have none.
    `curves` holds, for methods that train, the loss of every step: by phase, a list for each part
    of it (the blocks, or the one whole).
    `reading` is the first segment of the evaluation text token by token (see
    `quantlab.metrics.reading` and `quantlab.answers.spelled`); empty where there was no original.
    """

    variant: str
    method: str
    bits: int
    config: dict[str, Any]
    status: Status
    error: str | None = None
    hint: str | None = None
    perplexity: float | None = None
    perplexity_ci: tuple[float, float] | None = None
    kl_divergence: float | None = None
    kl_divergence_ci: tuple[float, float] | None = None
    top1_agreement: float | None = None
    size_bytes: int | None = None
    bits_per_weight: float | None = None
    quantize_seconds: float | None = None
    peak_rss_bytes: int | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    time_to_first_token_seconds: float | None = None
    kernel: str | None = None
    execution: Execution | None = None
    fallbacks: tuple[str, ...] = ()
    outputs: tuple[Generation, ...] = ()
    segments: dict[str, list[float]] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    activation_bits: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    artifact: str | None = None
    cached: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A plain JSON object; tuples become lists."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["outputs"] = [output.to_json() for output in self.outputs]
        for name in ("perplexity_ci", "kl_divergence_ci", "fallbacks"):
            data[name] = None if data[name] is None else list(data[name])
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ResultRecord:
        """The record `to_json` wrote; an unknown field is refused (TypeError)."""
        values = dict(data)
        values["outputs"] = tuple(Generation.from_json(output) for output in values["outputs"])
        values["fallbacks"] = tuple(values["fallbacks"])
        for name in ("perplexity_ci", "kl_divergence_ci"):
            values[name] = None if values[name] is None else (values[name][0], values[name][1])
        return cls(**values)


def document(environment: Mapping[str, Any], results: list[ResultRecord]) -> dict[str, Any]:
    """The document that `compare --json` and `evaluate --json` write."""
    return {
        "schema": SCHEMA,
        "environment": dict(environment),
        "results": [record.to_json() for record in results],
    }
