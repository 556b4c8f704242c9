"""What fits, how fast it could be at best, and what to choose for a use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from quantlab.advisor.devices import Device, Kind
from quantlab.advisor.shapes import ModelShape, check_whole
from quantlab.advisor.sizes import WeightSize, weight_size
from quantlab.errors import ConfigError

Fit = Literal["fits", "tight", "no"]
USES = ("research", "production", "edge", "experiment")
CACHE_BYTES = 2
"""Of one number in the KV cache: 16 bits."""
PREFILL = 512
"""Tokens of the prompt that are read at once."""
RUNTIME_BYTES = 240_000_000
"""Resident memory of a Python process with torch and the kernels and no model, measured on Linux;
assumed of every device (a CUDA context takes a few hundred MB as well, llama.cpp far less)."""
TIGHT = 0.9
"""Share of the usable memory above which a model is a tight fit."""
MOST_CONTEXT, MOST_BATCH = 10_000_000, 4096

VARIANTS = (
    "bf16",
    "smoothquant:8",
    "llm_int8:8",
    "gguf:q8_0",
    "gguf:q6_k",
    "gguf:q5_k_m",
    "gguf:q4_k_m",
    "gguf:q4_0",
    "gptq:4",
    "awq:4",
    "nf4:4",
    "gguf:q3_k_m",
    "gptq:3",
    "gguf:q2_k",
    "efficientqat:2",
)
"""What the advisor compares, widest first."""

_GGUF = tuple(f"gguf:{name}" for name in ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k"))
_EXTREME = ("efficientqat:2", "gguf:q2_k", "gptq:3", "gguf:q3_k_m")
PREFERENCES: Mapping[tuple[str, bool], tuple[str, ...]] = {
    ("research", True): ("bf16", "llm_int8:8", "awq:4", "gptq:3", "efficientqat:2"),
    ("research", False): ("bf16", *_GGUF),
    ("production", True): ("smoothquant:8", "awq:4", "gptq:3", "efficientqat:2"),
    ("production", False): _GGUF,
    ("edge", True): ("awq:4", "gptq:3", "efficientqat:2"),
    ("edge", False): (*_GGUF[3:], "efficientqat:2"),
    ("experiment", True): _EXTREME,
    ("experiment", False): _EXTREME,
}
"""(use, on a GPU) -> variants, the first that fits is recommended. Precision by use is that of
source article 001 (research FP16, production INT8, edge INT4, experiments 2 to 3 bits); GGUF on
CPUs and Apple machines, AWQ and GPTQ on GPUs that of article 004."""


@dataclass(frozen=True)
class Memory:
    """Bytes while a model answers."""

    weights: int
    kv_cache: int
    activations: int
    runtime: int = RUNTIME_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.runtime


@dataclass(frozen=True)
class Row:
    """One variant on one device. `tokens_per_second`: at most, of all sequences of the batch
    together; None while the bandwidth is not known. `longest_context`: tokens a sequence that fit
    beside the weights, 0 where even these do not."""

    variant: str
    size: WeightSize
    memory: Memory
    fit: Fit
    tokens_per_second: float | None
    longest_context: int


@dataclass(frozen=True)
class Advice:
    """`choice`: the recommended row, None where none of the use's variants fits; `passed_over`:
    what would have been better but does not fit."""

    shape: ModelShape
    device: Device
    use: str
    context: int
    batch: int
    rows: tuple[Row, ...]
    choice: Row | None
    passed_over: tuple[Row, ...]


def kv_cache_bytes(shape: ModelShape, context: int, batch: int, each: int = CACHE_BYTES) -> int:
    """2 (keys, values) * layers * kv_heads * head_dim * context * batch * bytes each."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * context * batch * each


def activation_bytes(shape: ModelShape, context: int, batch: int) -> int:
    """Buffers in float32, while a piece of the prompt passes through one block: residual and norm,
    q, k and v, both sides of the feed-forward; and the logits of one token a sequence. Attention is
    taken to keep no table of scores."""
    tokens = min(context, PREFILL) * batch
    inner = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    each = 2 * shape.width + inner + 2 * shape.feed_forward
    return 4 * (tokens * each + batch * shape.vocabulary)


def tokens_per_second(bandwidth: float, read: int, kv_cache: int, batch: int) -> float:
    """An upper bound: batch * bandwidth / (weights read + KV cache). A step gives every sequence of
    the batch one token, reads the weights once and each sequence's cache; its arithmetic, its
    writes and everything else are taken as free."""
    return batch * bandwidth / (read + kv_cache)


def fit(total: int, usable: int) -> Fit:
    """Whether so many bytes fit; 'tight' with less than a tenth to spare."""
    if total > usable:
        return "no"
    return "tight" if total > TIGHT * usable else "fits"


def row(shape: ModelShape, variant: str, context: int, batch: int, device: Device) -> Row:
    """The memory of one variant, and its bound of speed. Raises: ConfigError."""
    size = weight_size(shape, variant)
    memory = Memory(
        size.total,
        kv_cache_bytes(shape, context, batch),
        activation_bytes(shape, context, batch),
    )
    speed = None
    if device.bandwidth is not None:
        speed = tokens_per_second(device.bandwidth, size.read, memory.kv_cache, batch)
    left = device.usable - (memory.total - memory.kv_cache)
    longest = max(left // kv_cache_bytes(shape, 1, batch), 0)
    return Row(variant, size, memory, fit(memory.total, device.usable), speed, longest)


def advise(shape: ModelShape, context: int, batch: int, device: Device, use: str) -> Advice:
    """Every variant on the device, and which to choose. Raises: ConfigError for bad numbers."""
    check_whole("context", context, MOST_CONTEXT)
    check_whole("batch", batch, MOST_BATCH)
    if use not in USES:
        raise ConfigError(f"use: unknown {use!r}; choose {', '.join(USES)}")
    rows = tuple(row(shape, variant, context, batch, device) for variant in VARIANTS)
    by_name = {one.variant: one for one in rows}
    wanted = [by_name[name] for name in PREFERENCES[use, on_gpu(device.kind)]]
    place = next((i for i, one in enumerate(wanted) if one.fit != "no"), None)
    return Advice(
        shape,
        device,
        use,
        context,
        batch,
        rows,
        choice=None if place is None else wanted[place],
        passed_over=tuple(wanted[:place]),
    )


def on_gpu(kind: Kind) -> bool:
    """Whether a device's kernels are a discrete GPU's (Apple machines run GGUF best)."""
    return kind == "gpu"
