"""Figures of others: source article 001's tables, and papers', each with its protocol.

Perplexities compare only within one model, text and context length; so what stands beside a
measurement here is the change that each saw, together with what was different.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantlab.results import ResultRecord

ARTICLE = "source article 001"


@dataclass(frozen=True)
class Precision:
    """A row of the article's table: size as a share of FP32's, and typical loss in percent. It says
    neither of which model nor by which measure."""

    name: str
    bits: int
    size: float
    loss: tuple[float, float]


PRECISIONS = (
    Precision("FP32", 32, 1.0, (0, 0)),
    Precision("FP16", 16, 0.5, (0, 1)),
    Precision("INT8", 8, 0.25, (1, 3)),
    Precision("INT4", 4, 0.125, (3, 10)),
    Precision("2-bit", 2, 0.0625, (10, 20)),
)

HARDWARE = ("nvidia", "amd", "intel")
"""Vendors of the article's table of hardware support; its words are in the page's texts."""

SPEED_MODEL, SPEED_DEVICE = "Llama-2-7B", "rtx4090"
SPEEDS = (("bf16", 50.0), ("llm_int8:8", 80.0), ("gptq:4", 120.0))
"""The article's tokens a second of Llama 2 7B on an RTX 4090 (FP16, INT8, INT4), and the variant
whose bytes stand for each."""


@dataclass(frozen=True)
class Published:
    """One perplexity of one variant; `baseline` that of the unquantized model in the same source.
    `context` in tokens, None where the source does not say; `group` weights a scale, None where
    the method has none or the whole row shares one."""

    variant: str
    model: str
    text: str
    context: int | None
    group: int | None
    baseline: float
    perplexity: float
    source: str

    @property
    def change(self) -> float:
        """Relative change of perplexity."""
        return self.perplexity / self.baseline - 1


def _llama(variant: str, group: int | None, perplexity: float, source: str) -> Published:
    return Published(variant, "Llama-2-7B", "WikiText-2", 2048, group, 5.47, perplexity, source)


def _gguf(name: str, more: float) -> Published:
    source = "llama.cpp, perplexity README"
    variant = f"gguf:{name}"
    return Published(variant, "Llama-3-8B", "WikiText-2", 512, None, 6.233, 6.233 + more, source)


_AWQ = "AWQ, arXiv 2306.00978, table 4"
_EQAT = "EfficientQAT, arXiv 2407.11062"
_INT8 = "LLM.int8(), arXiv 2208.07339, table 1"
_GPTQ = "GPTQ, arXiv 2210.17323"

PUBLISHED = (
    _llama("smoothquant:8", None, 5.515, "SmoothQuant README, α 0.85"),
    Published("llm_int8:8", "13B", "C4", None, None, 12.45, 12.45, _INT8),
    _gguf("q8_0", 0.003),
    _gguf("q6_k", 0.022),
    _gguf("q5_k_m", 0.057),
    _gguf("q4_k_m", 0.175),
    _llama("rtn:4", 128, 5.73, _AWQ),
    _llama("gptq:4", 128, 5.69, _AWQ),
    Published("gptq:4", "OPT-125M", "WikiText-2", 2048, None, 27.65, 31.12, _GPTQ),
    _llama("awq:4", 128, 5.60, _AWQ),
    _llama("efficientqat:4", 128, 5.53, _EQAT),
    _gguf("q3_k_m", 0.657),
    _llama("rtn:3", 128, 6.66, _AWQ),
    _llama("gptq:3", 128, 6.43, _AWQ),
    Published("gptq:3", "OPT-125M", "WikiText-2", 2048, None, 27.65, 53.85, _GPTQ),
    _llama("awq:3", 128, 6.24, _AWQ),
    _llama("efficientqat:3", 128, 5.81, _EQAT),
    _gguf("q2_k", 3.52),
    _llama("efficientqat:2", 64, 6.86, _EQAT),
)


@dataclass(frozen=True)
class Measured:
    """A record's loss: `size` as a share of FP32's, `change` of perplexity against the run's own
    unquantized row, None without one."""

    record: ResultRecord
    size: float | None
    change: float | None


def measured(records: tuple[ResultRecord, ...]) -> tuple[Measured, ...]:
    """The finished records of a run, each beside the run's unquantized one."""
    done = [one for one in records if one.status == "finished"]
    plain = (one.perplexity for one in done if one.bits >= 16 and one.perplexity is not None)
    baseline = next(plain, None)
    found = []
    for one in done:
        size = None if one.bits_per_weight is None else one.bits_per_weight / 32
        change = None
        if baseline and one.perplexity is not None:
            change = one.perplexity / baseline - 1
        found.append(Measured(one, size, change))
    return tuple(found)


def plain_variant(record: ResultRecord) -> str:
    """The variant without its options, as published figures name it: `gptq:4`."""
    return ":".join(part for part in record.variant.split(":") if "=" not in part)
