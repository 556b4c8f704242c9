"""Packed weights in the native kernels' layout."""

from __future__ import annotations

import torch

from kernels import native
from kernels.native_linear import MODES
from quantlab.codebook import codebook
from quantlab.packing import AffineWeight, CodebookWeight, GGMLWeight, OutlierWeight, PackedWeight


def native_form(weight: PackedWeight) -> str | None:
    """Why this weight has no native form, None where it has."""
    if isinstance(weight, OutlierWeight):
        return None
    if isinstance(weight, AffineWeight):
        rows_share = weight.group_size >= weight.columns
        if not rows_share and weight.group_size % 4:
            return f"no native layout for groups of {weight.group_size}: no multiple of 4"
        if weight.activation and not (weight.bits == 8 and weight.symmetric and rows_share):
            return "no native layout for 8-bit inputs but with symmetric 8-bit rows"
        return None
    if isinstance(weight, CodebookWeight):
        if weight.columns % weight.block_size:
            return f"no native layout for blocks of {weight.block_size} that run across rows"
        return None
    kind = weight.type if isinstance(weight, GGMLWeight) else type(weight).__name__
    return f"no native layout for {kind} weights"


def matrix_of(weight: PackedWeight) -> tuple[native.Matrix, native.How | None]:
    """The weight, and how its input enters where the weight says so (None: as the caller likes).

    Raises: NotImplementedError for a weight that has no native form.
    """
    if isinstance(weight, AffineWeight):
        codes, scales, zeros = weight.unpacked()
        group = min(weight.group_size, weight.shape[1])
        matrix = native.Matrix.affine(codes, scales, zeros, weight.bits, group)
        if weight.activation is None:
            return matrix, None
        a = weight.activation
        return matrix, native.How(MODES[a.kind], a.scale, a.zero)
    if isinstance(weight, OutlierWeight):
        codes = weight.codes.view(torch.uint8) ^ 128
        scales = weight.scales[:, None]
        middle = torch.full_like(scales, 128.0)
        matrix = native.Matrix.affine(codes, scales, middle, 8, weight.shape[1])
        how = native.How(native.INT8_ROW)
        if weight.threshold:
            how = native.How(native.INT8_OUTLIERS, threshold=weight.threshold)
        return matrix, how
    if reason := native_form(weight):
        raise NotImplementedError(reason)
    assert isinstance(weight, CodebookWeight)
    count = weight.rows * weight.columns
    pairs = torch.stack((weight.codes >> 4, weight.codes & 15), 1).flatten()[:count]
    scales = weight.block_absmax().view(weight.rows, -1)
    values = codebook(weight.codebook)
    codes = pairs.view(weight.rows, weight.columns)
    return native.Matrix.table(codes, scales, values, weight.block_size), None
