"""Computations of the walkthroughs for programs: Gradio's API, and MCP where it is switched on.

Each is stateless and works on the numbers it is given; a wrong argument is one message.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import gradio as gr
import torch

from quantlab.errors import ConfigError, QuantLabError
from quantlab.learn import formats, matrix, outlier, superblock

MOST = 4096
"""Numbers that a call may bring."""


def number_formats(value: float) -> list[dict[str, Any]]:
    """The bits of a number in FP32, FP16, BF16, FP8 E4M3 and FP8 E5M2.

    Args:
        value: the number; it is rounded to the nearest that each format has.

    Returns:
        for each format its name, bits (highest first), widths of the fields, and value as text.
    """
    return [
        {
            "format": one.name,
            "bits": "".join(map(str, one.bits)),
            "fields": list(one.fields),
            "value": repr(one.value),
        }
        for one in formats.floats(float(value))
    ]


def quantized_product(
    x: list[list[float]], w: list[list[float]], scheme: str = "absmax", bits: int = 8
) -> dict[str, Any]:
    """The product X W^T with both factors rounded, beside the exact one.

    Args:
        x: rows of activations.
        w: rows of weights, as long as those of x.
        scheme: absmax, zero_point (one grid a matrix), or llm_int8 (8 bits, outliers from 6 apart).
        bits: 2 to 8, for absmax and zero_point.

    Returns:
        exact, result, difference, and the error as a share of the exact product's size.
    """
    return _told(lambda: _product(x, w, scheme, bits))


def rounding_error(
    weights: list[float], bits: int = 4, group_size: int = 64, outlier_times: float = 1.0
) -> dict[str, Any]:
    """What absmax rounding in groups makes of a row of weights whose largest is stretched.

    Args:
        weights: the row.
        bits: 2 to 8.
        group_size: weights that share one step.
        outlier_times: the largest weight is first made so many times as large.

    Returns:
        the rounded weights, the step of each, and the RMS error of all but the largest.
    """
    return _told(lambda: _rounding(weights, bits, group_size, outlier_times))


def gguf_block(weights: list[float], kind: str = "q4_k") -> dict[str, Any]:
    """One block of a GGUF file, byte by byte.

    Args:
        weights: 256 numbers (of which q4_0 takes the first 32).
        kind: q4_0 or q4_k.

    Returns:
        bytes in hexadecimal, the field of each, codes, decoded weights, and the block's factors.
    """
    return _told(lambda: _block(weights, kind))


FUNCTIONS: tuple[Callable[..., Any], ...] = (
    number_formats,
    quantized_product,
    rounding_error,
    gguf_block,
)


def _told(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return compute()
    except QuantLabError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _row(name: str, values: list[float]) -> list[float]:
    try:
        row = [float(value) for value in values]
    except (TypeError, ValueError):
        row = []
    if not 1 <= len(row) <= MOST or not all(map(math.isfinite, row)):
        raise ConfigError(f"{name}: needs 1 to {MOST} finite numbers")
    return row


def _whole(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise ConfigError(f"{name}: needs a whole number from {low} to {high}")
    return int(value)


def _product(x: list[list[float]], w: list[list[float]], scheme: str, bits: int) -> dict[str, Any]:
    left, right = (
        tuple(tuple(_row(name, row)) for row in rows) for name, rows in (("x", x), ("w", w))
    )
    widths = {len(row) for row in (*left, *right)}
    if not left or not right or len(widths) != 1:
        raise ConfigError("x, w: need rows of one length")
    found = matrix.product(left, right, scheme, _whole("bits", bits, 2, 8))
    told = dataclasses.asdict(found)
    return {key: told[key] for key in ("exact", "result", "difference", "error", "outliers")}


def _rounding(weights: list[float], bits: int, group_size: int, times: float) -> dict[str, Any]:
    row = torch.tensor(_row("weights", weights))
    group = _whole("group_size", group_size, 1, MOST)
    if not math.isfinite(times):
        raise ConfigError("outlier_times: needs a finite number")
    found = outlier.rounded(row, times, _whole("bits", bits, 2, 8), group, True)
    return {
        "rounded": found.rounded.tolist(),
        "steps": found.scale.tolist(),
        "rms": found.rms if len(row) > 1 else 0.0,
    }


def _block(weights: list[float], kind: str) -> dict[str, Any]:
    row = _row("weights", weights)
    if len(row) != superblock.SUPER:
        raise ConfigError(f"weights: needs {superblock.SUPER} numbers, not {len(row)}")
    found = superblock.taken_apart(torch.tensor(row), kind)
    return {
        "bytes": "".join(f"{one.value:02x}" for one in found.bytes),
        "fields": [one.field for one in found.bytes],
        "codes": found.codes.tolist(),
        "decoded": found.decoded.tolist(),
        "d": found.d,
        "dmin": found.dmin,
    }
