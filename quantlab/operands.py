"""Packed weights as kernels are asked about them and get them."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from kernels.base import ActivationKind, Operands, Problem
from quantlab.codebook import codebook
from quantlab.ggml import FORMATS, layout_of
from quantlab.ggml.block import Grids
from quantlab.packing import (
    AffineWeight,
    CodebookWeight,
    GGMLWeight,
    OutlierWeight,
    PackedWeight,
    PermutedWeight,
)


def problem_of(weight: PackedWeight, device: str, dtype: torch.dtype) -> Problem | str:
    """The layer that this weight makes with inputs of `dtype`, or why there is no kernel for it."""
    rows, columns = weight.shape
    base = Problem(rows, columns, None, columns, True, None, device, dtype)
    if isinstance(weight, PermutedWeight):
        return problem_of(weight.inner, device, dtype)
    if isinstance(weight, OutlierWeight):
        kind: ActivationKind = "outlier" if weight.threshold else "token"
        return dataclasses.replace(base, bits=8, activation=kind)
    if isinstance(weight, AffineWeight):
        return dataclasses.replace(
            base,
            bits=weight.bits,
            group_size=min(weight.group_size, columns),
            symmetric=weight.symmetric,
            activation=None if weight.activation is None else weight.activation.kind,
        )
    if isinstance(weight, CodebookWeight):
        if columns % weight.block_size:
            return f"no kernel for blocks of {weight.block_size} that run across rows"
        return dataclasses.replace(base, bits=4, group_size=weight.block_size, grid="table")
    if isinstance(weight, GGMLWeight) and FORMATS[weight.type].layout is not None:
        format, one = FORMATS[weight.type], example(weight.type)
        return dataclasses.replace(
            base,
            bits=format.bits,
            group_size=format.block_size // one.scales.shape[1],
            grid="table" if one.table else "uniform" if one.offsets is None else "offset",
        )
    return f"no kernel for {getattr(weight, 'type', type(weight).__name__)} weights"


@functools.cache
def example(type: str) -> Grids:
    """A block of zero bytes: which grids the format has. Only for formats that have some."""
    format = FORMATS[type]
    return layout_of(type).read(torch.zeros(1, format.block_bytes, dtype=torch.uint8))


def operands_of(weight: PackedWeight, bias: Tensor | None = None) -> Operands:
    """The tensors of a weight for which `problem_of` gives a problem."""
    if isinstance(weight, PermutedWeight):
        return operands_of(weight.inner, bias)
    if isinstance(weight, OutlierWeight):
        codes, scales = weight.codes.view(torch.uint8) ^ 128, weight.scales[:, None]
        zeros = torch.full_like(scales, 128.0)
        return Operands(codes, scales, zeros, bias, threshold=weight.threshold)
    if isinstance(weight, CodebookWeight):
        pairs = torch.stack((weight.codes >> 4, weight.codes & 15), 1).flatten()
        scales = weight.block_absmax().view(weight.rows, -1)
        codes = pairs[: weight.rows * weight.columns].view(weight.shape)
        values = codebook(weight.codebook)
        return Operands(codes, scales, torch.zeros_like(scales), bias, table=values)
    if isinstance(weight, GGMLWeight):
        return _operands_of_blocks(weight, bias)
    assert isinstance(weight, AffineWeight)
    codes, scales, zeros = weight.unpacked()
    if weight.activation is None:
        return Operands(codes, scales, zeros, bias)
    return Operands(codes, scales, zeros, bias, weight.activation.scale, weight.activation.zero)


def _operands_of_blocks(weight: GGMLWeight, bias: Tensor | None) -> Operands:
    grids = layout_of(weight.type).read(weight.blocks)
    rows, columns = weight.shape
    scales = grids.scales.view(rows, -1)
    zeros = torch.full_like(scales, float(grids.zero))
    if grids.offsets is not None:
        zeros = grids.offsets.view(rows, -1)
    table = None if grids.table is None else torch.tensor(grids.table, dtype=torch.float32)
    return Operands(grids.codes.reshape(rows, columns), scales, zeros, bias, table=table)
