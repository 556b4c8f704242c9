"""The products alone: one row against what the machine reads, many rows against its peak.

Both are measured in the same round, on the same threads: first the machine, then the kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from kernels import native, native_probe
from quantlab.bench.spec import goal
from quantlab.bench.subjects import SHAPE
from quantlab.metrics.speed import PROMPT_TOKENS

ROUNDS = 9
LEAST_BYTES = 256 * 2**20
GEMV_BITS = (4, 8, 2, 3)
MODES = {"": native.How(native.INT8_BLOCK), "-exact": native.How(native.EXACT)}
INT8_MODES = (native.INT8_BLOCK, native.INT8_ROW)


@dataclass(frozen=True)
class Product:
    """A kind of weight and input in the table of prefill linears. `bits` 8 with INT8_ROW is W8A8: a
    grid a row."""

    name: str
    bits: int
    how: native.How


PRODUCTS = (
    Product("w8a8", 8, native.How(native.INT8_ROW)),
    Product("q4", 4, native.How(native.INT8_BLOCK)),
    Product("q4-exact", 4, native.How(native.EXACT)),
    Product("q8", 8, native.How(native.INT8_BLOCK)),
    Product("bf16", 16, native.How(native.BF16)),
)


def shapes(quick: bool) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of the linears of a block of the generated model, or an eighth of it."""
    part = 8 if quick else 1
    width, inner = SHAPE["hidden_size"] // part, SHAPE["intermediate_size"] // part
    inside = width * SHAPE["num_key_value_heads"] // SHAPE["num_attention_heads"]
    square, narrow, wide, tall = (width, width), (inside, width), (inner, width), (width, inner)
    return (square, narrow, narrow, square, wide, wide, tall)


JOINED = (False, True, True, False, False, True, False)
"""Which of `shapes` read what the one before reads: queries, keys and values; gate and up."""


def working_set() -> int:
    """Bytes that no cache holds: twice the largest, within a quarter of the free memory."""
    cache = max((_bytes(path.read_text()) for path in _caches()), default=0)
    return max(LEAST_BYTES, min(2 * cache, psutil.virtual_memory().available // 4))


def _caches() -> Sequence[Path]:
    return sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))


def _bytes(text: str) -> int:
    """'32768K' as bytes."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    text = text.strip()
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text or 0)


def gemv(threads: int, group_size: int, quick: bool) -> dict[str, dict[str, Any]]:
    """Bytes a second of packed weights passing one row, against reading as many bytes; by
    `q4/THREADS`, and `q4-exact/THREADS` for float32 inputs."""
    torch.set_num_threads(threads)
    total = LEAST_BYTES // 16 if quick else working_set()
    data = native_probe.bytes_like(torch.ones(total, dtype=torch.uint8))
    found: dict[str, dict[str, Any]] = {}
    for bits in GEMV_BITS:
        matrices = enough(bits, group_size, total, quick)
        size = sum(read_bytes(matrix) for matrix in matrices)
        run = passes(matrices, 1)
        for suffix, how in MODES.items():
            fractions, rates, limits = [], [], []
            run(how)
            for _ in range(1 if quick else ROUNDS):
                limits.append(native_probe.read_bandwidth(data))
                rates.append(size / run(how))
                fractions.append(rates[-1] / limits[-1])
            name = f"q{bits}{suffix}"
            found[f"{name}/{threads}"] = _against(
                fractions, rates, limits, goal("gemv", name), "bytes_per_second", bytes=size
            )
    return found


def prefill(threads: int, group_size: int, quick: bool) -> dict[str, dict[str, Any]]:
    """Operations a second of a block's linears at 512 rows, against the peak of the arithmetic that
    runs (int8 or bfloat16, as the entry says); by `w8a8/THREADS`."""
    torch.set_num_threads(threads)
    found: dict[str, dict[str, Any]] = {}
    sizes = shapes(quick)
    rows = PROMPT_TOKENS
    operations = sum(2.0 * rows * high * wide for high, wide in sizes)
    for product in PRODUCTS:
        w8a8 = product.name == "w8a8"
        matrices = [
            native_probe.random_matrix(high, wide, product.bits, wide if w8a8 else group_size)
            for high, wide in sizes
        ]
        run = passes(matrices, rows)
        int8 = native_probe.mode_for(product.how, rows, product.bits) in INT8_MODES
        kind = native_probe.INT8 if int8 else native_probe.BF16
        fractions, rates, limits = [], [], []
        run(product.how)
        for _ in range(1 if quick else ROUNDS):
            limits.append(native_probe.peak(kind))
            rates.append(operations / run(product.how))
            fractions.append(rates[-1] / limits[-1])
        aim = goal("linears", product.name)
        found[f"{product.name}/{threads}"] = _against(
            *(fractions, rates, limits, aim, "operations_per_second"),
            peak="int8" if int8 else "bfloat16",
        )
    return found


def enough(bits: int, group_size: int, total: int, quick: bool) -> list[native.Matrix]:
    """Blocks of matrices until they hold at least `total` bytes, each in memory of its own."""
    block = [native_probe.random_matrix(*shape, bits, group_size) for shape in shapes(quick)]
    matrices = list(block)
    while sum(read_bytes(matrix) for matrix in matrices) < total:
        matrices += [native_probe.copy_of(matrix) for matrix in block]
    return matrices


def read_bytes(matrix: native.Matrix) -> int:
    """What a product reads of a matrix: codes and grids."""
    return matrix.nbytes - matrix.tensors["sums"].nbytes


def passes(matrices: Sequence[native.Matrix], rows: int) -> Callable[[native.How], float]:
    """A function that multiplies random inputs by every matrix of whole blocks once, and gives the
    seconds. As in the engine, linears that read the same input share its preparation."""
    x = native_probe.room(rows, max(matrix.columns for matrix in matrices)).normal_()
    y = native_probe.room(rows, max(matrix.rows for matrix in matrices))
    joined = JOINED * (len(matrices) // len(JOINED))

    def run(how: native.How) -> float:
        start = time.perf_counter()
        native_probe.multiply_each(matrices, x, y, how, joined)
        return time.perf_counter() - start

    return run


def _against(
    fractions: list[float],
    rates: list[float],
    limits: list[float],
    aim: float | None,
    unit: str,
    **facts: Any,
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "fraction": statistics.median(fractions),
        "quantlab": statistics.median(rates),
        "machine": statistics.median(limits),
        "unit": unit,
        **facts,
        "range": {
            "fraction": [min(fractions), max(fractions)],
            "quantlab": [min(rates), max(rates)],
            "machine": [min(limits), max(limits)],
        },
    }
    return entry if aim is None else {**entry, "goal": aim}
