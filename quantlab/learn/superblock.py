"""Walkthrough 8: blocks of GGUF, byte by byte.

The bytes are those of `quantlab.ggml`; a field says what each of them holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.errors import ConfigError
from quantlab.ggml import block_format, dequantize_rows, quantize_rows
from quantlab.ggml.superblock import unpack_scale_mins
from quantlab.learn.material import Slice

SUPER = 256
SHOWN = ("q4_0", "q4_k")
COMPARED = ("q2_k", "q3_k", "iq4_nl", "q4_0", "q4_k", "q4_1", "q5_0", "q5_k", "q6_k", "q8_0")


@dataclass(frozen=True)
class Byte:
    """One byte of a block: its value, the field it belongs to (d, dmin, scales, qs), and the
    weights whose codes it holds (by their place in the block)."""

    value: int
    field: str
    weights: tuple[int, ...]
    codes: tuple[int, ...]


@dataclass(frozen=True)
class Taken:
    """A block taken apart. `weights` and `decoded`: float32 [weights]; `codes` one a weight;
    `scales` and `minima`: what a code is multiplied with, and what is taken off, one a weight;
    `d`, `dmin` (None in q4_0) the block's own factors; `factors` the 6-bit scale and minimum of
    each sub-block (q4_k)."""

    type: str
    bytes: tuple[Byte, ...]
    weights: Tensor
    decoded: Tensor
    codes: Tensor
    scales: Tensor
    minima: Tensor
    d: float
    dmin: float | None
    factors: tuple[tuple[int, int], ...]
    bits_per_weight: float


def weights_of(one: Slice, row: int) -> Tensor:
    """256 consecutive weights of a row: float32 [256]. Raises: ConfigError where there are none."""
    rows, columns = one.weight.shape
    if columns < SUPER:
        raise ConfigError(
            f"layer: {one.layer} reads {columns} channels; a super-block needs {SUPER}, "
            "choose a wider linear"
        )
    return one.weight[min(max(row, 0), rows - 1), :SUPER]


def taken_apart(weights: Tensor, kind: str, block: int = 0) -> Taken:
    """Block number `block` of 256 weights in the format `kind`: 'q4_0' or 'q4_k'."""
    if kind not in SHOWN:
        raise ConfigError(f"type: {kind!r}; choose one of {', '.join(SHOWN)}")
    size = block_format(kind).block_size
    part = weights[block * size : (block + 1) * size]
    data = quantize_rows(part[None], kind)[0]
    decoded = dequantize_rows(data[None], kind, size)[0]
    factors: tuple[tuple[int, int], ...] = ()
    dmin: float | None = None
    d = float(data[:2].view(torch.float16).float())
    if kind == "q4_0":
        layout = [("qs", at, (at, at + 16)) for at in range(16)]
        codes = torch.cat((data[2:] & 15, data[2:] >> 4)).long()
        fields = ["d", "d"]
        scales, minima = torch.full((size,), d), torch.full((size,), 8 * d)
        head = 2
    else:
        # A quarter of 64 weights keeps its first half in low nibbles, its second in high ones.
        layout = [
            ("qs", at, (64 * (at // 32) + at % 32, 64 * (at // 32) + at % 32 + 32))
            for at in range(128)
        ]
        quarters = data[16:].view(4, 32)
        codes = torch.stack((quarters & 15, quarters >> 4), 1).reshape(-1).long()
        six, low = unpack_scale_mins(data[None, 4:16])
        dmin = float(data[2:4].view(torch.float16).float())
        scales = (d * six[0]).repeat_interleave(32)
        minima = (dmin * low[0]).repeat_interleave(32)
        factors = tuple((int(s), int(m)) for s, m in zip(six[0], low[0], strict=True))
        fields = ["d", "d", "dmin", "dmin", *["scales"] * 12]
        head = 16
    values = data.tolist()
    bytes_ = [Byte(value, field, (), ()) for value, field in zip(values, fields, strict=False)]
    for (field, at, places), value in zip(layout, values[head:], strict=True):
        held = tuple(int(codes[place]) for place in places)
        assert at >= 0
        bytes_.append(Byte(value, field, places, held))
    return Taken(
        kind,
        tuple(bytes_),
        part,
        decoded,
        codes,
        scales,
        minima,
        d,
        dmin,
        factors,
        block_format(kind).bits_per_weight,
    )


@dataclass(frozen=True)
class Compared:
    """Formats on the same weights: bits a weight with everything counted, and root mean square
    error as a share of the weights' own."""

    types: tuple[str, ...]
    bits_per_weight: tuple[float, ...]
    errors: tuple[float, ...]


def compared(one: Slice, rows: int) -> Compared:
    """All formats on the first `rows` rows of the slice (its first 256 channels)."""
    weights_of(one, 0)
    weight = one.weight[: max(rows, 1), :SUPER].contiguous()
    errors = []
    for kind in COMPARED:
        back = dequantize_rows(quantize_rows(weight, kind), kind, SUPER)
        errors.append(float((back - weight).square().mean().sqrt() / weight.square().mean().sqrt()))
    bits = tuple(block_format(kind).bits_per_weight for kind in COMPARED)
    return Compared(COMPARED, bits, tuple(errors))
