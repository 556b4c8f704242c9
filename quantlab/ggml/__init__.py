"""QuantLab's own ggml block formats: weights to the bytes of a GGUF tensor, and back.

    data = quantize_rows(weight, "q4_k")                    # float [rows, columns] -> uint8
    weight = dequantize_rows(data, "q4_k", columns)         # uint8 -> float32 [rows, columns]

Everything is plain torch, vectorised over all blocks of a chunk, and follows the formats and the
searches of ggml (`ggml-common.h`, `ggml-quants.c` in llama.cpp), whose bytes it reproduces.
`quantlab.ggml.mixes` says which format each tensor of a model gets in a file type such as q4_k_m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from quantlab.errors import ConfigError, MethodError
from quantlab.grid import all_finite

from . import iq4_nl, plain, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0
from .block import BlockFormat, Layout, clamp_input, exact_sqrt
from .ordered import LANES, ordered_sum

__all__ = [
    "FORMATS",
    "BlockFormat",
    "block_format",
    "dequantize_rows",
    "layout_of",
    "quantize_rows",
]

FORMATS: dict[str, BlockFormat] = {
    entry.name: entry
    for entry in (
        plain.F32,
        plain.F16,
        plain.BF16,
        q8_0.FORMAT,
        q6_k.FORMAT,
        q5_k.FORMAT,
        q5_1.FORMAT,
        q5_0.FORMAT,
        q4_k.FORMAT,
        q4_1.FORMAT,
        q4_0.FORMAT,
        iq4_nl.FORMAT,
        q3_k.FORMAT,
        q2_k.FORMAT,
    )
}
"""Every block format by name, from the most bits to the fewest."""

_CHUNK_WEIGHTS = 2**18
# Weights worked on at once. A smaller buffer stays in the caches, but every call takes Python's
# lock, and a thread that has to wait for it sleeps for longer than the call takes: on two threads
# 2**17 was a quarter slower than this (2**16 on one), 2**19 as fast.

_EVEN_WEIGHTS = 32 * LANES
# Chunks of such multiples have sub-blocks of 16 and 32 in multiples of `LANES`.

_IMPORTANCE_EXPONENT = 20
# Importance is scaled down to below 2**20: the comparisons multiply three sums weighted by it.


def block_format(name: str) -> BlockFormat:
    """The format of that name; ConfigError for an unknown one."""
    try:
        return FORMATS[name]
    except KeyError:
        known = ", ".join(FORMATS)
        raise ConfigError(f"unknown ggml block format {name!r}; known: {known}") from None


def layout_of(name: str) -> Layout:
    """Where a format with codes keeps them; ConfigError for f32, f16 and bf16, which have none."""
    found = block_format(name).layout
    if found is None:
        raise ConfigError(f"{name} has no codes")
    return found


def quantize_rows(weight: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    """Quantize a matrix row by row.

    Args:
        weight: `[rows, columns]`, any floating dtype; computed in float32.
        name: block format, a key of `FORMATS`.
        importance: `[columns]`, the weight of each column's squared error (llama.cpp's importance
            matrix: the mean square of the inputs of that column). Non-negative and finite; its
            overall scale does not matter. Ignored by q8_0 and the unquantized types.

    Returns: uint8 `[rows, columns / block_size * block_bytes]`.

    Raises:
        ConfigError: unknown format, columns not a multiple of its block size, unusable importance.
        MethodError: the weights hold NaN or infinity.

    Chunks of rows are shared out over as many threads as torch is set to, each with about ten
    buffers of 1 MB.
    """
    entry = block_format(name)
    if weight.dim() != 2:
        raise ConfigError(f"weight must have 2 dimensions [rows, columns], not {weight.dim()}")
    rows, columns = weight.shape
    row_bytes = _row_bytes(entry, columns)
    column_weights = None if importance is None else _clean_importance(importance, columns)
    weight = weight.detach()
    data = torch.empty(rows, row_bytes, dtype=torch.uint8, device=weight.device)
    step = _chunk_rows(columns)

    def work(start: int) -> None:
        chunk = weight[start : start + step].to(torch.float32)
        if not all_finite(chunk):
            raise MethodError("weights hold NaN or infinity; quantizing needs finite numbers")
        error_weights = None
        if column_weights is not None:
            error_weights = column_weights.to(weight.device).expand_as(chunk)
            if entry.row_weighted:
                error_weights = error_weights * _row_spread(chunk)
            error_weights = error_weights.reshape(-1, entry.block_size)
        blocks = chunk.reshape(-1, entry.block_size)
        data[start : start + step] = entry.quantize(blocks, error_weights).view(-1, row_bytes)

    _share_out(work, range(0, rows, step))
    return data


def dequantize_rows(data: Tensor, name: str, columns: int) -> Tensor:
    """Decode the rows of a quantized matrix.

    Args: data uint8 `[rows, bytes a row]`; name of the block format; columns of the matrix.

    Returns: float32 `[rows, columns]`.

    Raises: ConfigError for an unknown format or a size that does not match `columns`.
    """
    entry = block_format(name)
    row_bytes = _row_bytes(entry, columns)
    if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] != row_bytes:
        raise ConfigError(
            f"{name} rows of {columns} weights are uint8 [rows, {row_bytes}], "
            f"not {str(data.dtype).removeprefix('torch.')} {list(data.shape)}"
        )
    rows = data.shape[0]
    weight = torch.empty(rows, columns, dtype=torch.float32, device=data.device)
    step = _chunk_rows(columns)
    with _one_thread():
        for start in range(0, rows, step):
            blocks = data[start : start + step].reshape(-1, entry.block_bytes)
            weight[start : start + step] = entry.dequantize(blocks).view(-1, columns)
    return weight


def _chunk_rows(columns: int) -> int:
    """Rows of a chunk, even where possible: see `_EVEN_WEIGHTS`."""
    rows = max(1, _CHUNK_WEIGHTS // max(1, columns))
    even = _EVEN_WEIGHTS // math.gcd(_EVEN_WEIGHTS, columns)
    return rows // even * even or rows


def _share_out(work: Callable[[int], None], starts: Sequence[int]) -> None:
    """Call `work` with every start, on as many threads as torch is set to; see `_one_thread`."""
    workers = min(torch.get_num_threads(), len(starts))
    with _one_thread():
        if workers < 2:
            for start in starts:
                work(start)
            return
        # A new thread takes the number of threads that torch is set to now, which is one.
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(work, starts):
                pass


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch operations of this thread without an OpenMP team.

    A search is thousands of operations of some ten microseconds. A team of two threads gained 0 to
    40% on idle cores and lost a factor of 3 to 30 while another process used one of them, because
    the team waits for its slowest member at every operation. Threads that each take chunks of their
    own wait for nobody: two of them were 1.6 times as fast on idle cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _row_bytes(entry: BlockFormat, columns: int) -> int:
    if columns % entry.block_size:
        raise ConfigError(
            f"{entry.name} needs a multiple of {entry.block_size} columns, not {columns}"
        )
    return columns // entry.block_size * entry.block_bytes


def _row_spread(chunk: Tensor) -> Tensor:
    """sqrt(mean(row^2) + x^2), float32 `[rows, columns]`: how ggml weighs 32-wide blocks."""
    x = clamp_input(chunk)
    squares = x * x
    total = ordered_sum(squares.t().contiguous())
    return exact_sqrt(squares.add_((total / chunk.shape[1]).unsqueeze(1)))


def _clean_importance(importance: Tensor, columns: int) -> Tensor:
    """Check an importance vector and make it safe for float32 arithmetic; float32 `[columns]`."""
    if importance.dim() != 1 or importance.shape[0] != columns:
        raise ConfigError(
            f"importance must have one value a column [{columns}], not {list(importance.shape)}"
        )
    values = importance.detach().to(torch.float64)
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise ConfigError("importance must be finite and not negative")
    positive = values[values > 0]
    if not positive.numel():
        return torch.ones(columns, dtype=torch.float32, device=values.device)
    # Products with large activations stay finite; a power of two changes no rounding.
    exponent = min(0, _IMPORTANCE_EXPONENT - int(torch.frexp(positive.amax()).exponent))
    scaled = (values * 2.0**exponent).to(torch.float32)
    # Columns that calibration never excited would be quantized to zero if a whole sub-block of
    # them had no weight. (llama.cpp does that.) They count as little as the least important column.
    for start in range(0, columns, 16):
        if not bool((scaled[start : start + 16] > 0).any()):
            scaled[start : start + 16] = float(scaled[scaled > 0].amin())
    return scaled
