"""Hand-made records for tests of figures, tables, reports and the page; nothing was measured."""

from __future__ import annotations

from typing import Any

from quantlab.results import ResultRecord
from quantlab.runs import Run
from quantlab.types import Generation, RunSpec, VariantSpec

SEGMENTS = 32


def record(variant: str, **changes: Any) -> ResultRecord:
    """A finished, packed record of `method:bits`; `nll` and `kl` become equal segments around
    the value given, with the same ripple for every record, so that differences are exact."""
    method, _, kind = variant.partition(":")
    bits = int(kind) if kind.isdigit() else (4 if kind else 16)
    nll, kl = changes.pop("nll", 3.4), changes.pop("kl", 0.0 if bits == 16 else 0.1)
    ripple = [0.1 * (-1) ** index for index in range(SEGMENTS)]
    values: dict[str, Any] = {
        "variant": variant,
        "method": method,
        "bits": bits,
        "config": {"type": kind} if method == "gguf" else {},
        "status": "finished",
        "perplexity": 30.0,
        "perplexity_ci": (28.0, 32.0),
        "kl_divergence": kl,
        "kl_divergence_ci": (kl * 0.9, kl * 1.1),
        "top1_agreement": 0.9,
        "size_bytes": 98_000_000,
        "bits_per_weight": 5.83,
        "quantize_seconds": 61.0,
        "peak_rss_bytes": 1_200_000_000,
        "prefill_tokens_per_second": 500.0,
        "decode_tokens_per_second": 40.0,
        "time_to_first_token_seconds": 0.25,
        "kernel": "a kernel",
        "execution": "packed",
        "segments": {
            "nll": [nll + one for one in ripple],
            "kl": [kl + kl * one for one in ripple],
        },
        "environment": {"cpu": "a processor"},
    }
    return ResultRecord(**(values | changes))


def failed(variant: str, error: str = "it broke", hint: str | None = "mend it") -> ResultRecord:
    """A failed record: nothing measured, a reason, and what to try."""
    method, _, kind = variant.partition(":")
    bits = int(kind) if kind.isdigit() else 4
    return ResultRecord(variant, method, bits, {}, "failed", error=error, hint=hint)


def generation(text: str, *pieces: str, first: int | None = None) -> Generation:
    """An answer to 'Why?' with these pieces as its tokens."""
    return Generation("Why?", text or "".join(pieces), tuple(range(len(pieces))), pieces, first)


def run(*records: ResultRecord, **changes: Any) -> Run:
    """A finished run of these records."""
    variants = tuple(
        VariantSpec(
            one.method,
            None if one.method == "gguf" or one.bits == 16 else one.bits,
            tuple(sorted(one.config.items())) if one.method == "gguf" else (),
        )
        for one in records
    )
    values: dict[str, Any] = {
        "id": "20260101-120000-abcdef",
        "kind": "compare",
        "spec": RunSpec(variants=variants, prompts=("Why?",)),
        "status": "finished",
        "error": None,
        "created": 1_767_268_800.0,
        "started": 1_767_268_801.0,
        "ended": 1_767_268_901.0,
        "environment": {"cpu": "a processor", "versions": {"torch": "2.13.0"}, "network": False},
        "records": records,
        "parent": None,
    }
    return Run(**(values | changes))
