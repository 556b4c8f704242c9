"""Weights on uniform grids, and how the input of a W8A8 linear is quantized."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantlab.errors import ConfigError
from quantlab.grid import spread
from quantlab.packing.base import bits_per_weight
from quantlab.packing.bits import pack_bits, packed_width, unpack_bits


@dataclass(frozen=True)
class Activation:
    """How the input of a W8A8 linear is quantized, 8 bits.

    'token': one absmax step for each row at run time, x ~ code * max|x| / 127.
    'tensor': the fixed step and zero-point found in calibration, x ~ (code - zero) * scale with
    codes 0 to 255.
    'dynamic_tensor', 'dynamic_token': x ~ (code - zero) * scale with codes 0 to 255 too, step and
    zero-point from the smallest and largest x at run time (extended to contain 0), of the whole
    input or of each row. What 'dynamic_tensor' makes of a token depends on the others it is read
    with.
    """

    kind: Literal["token", "tensor", "dynamic_tensor", "dynamic_token"]
    scale: float = 1.0
    zero: int = 0


@dataclass(frozen=True)
class AffineWeight:
    """Codes on uniform grids: w = (code - zero) * scale, one grid for each row and group.

    codes: uint8 [rows, ceil(columns * bits / 8)] (`pack_bits`); scales: float16 or float32
    [rows or 1, groups]; zeros: uint8 [rows or 1, ceil(groups * bits / 8)] packed like codes, or
    None for symmetric grids, where zero = 2**(bits - 1). `group_size` = columns means a grid a row;
    a single row of scales serves every row (a grid a tensor).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    columns: int
    activation: Activation | None = None

    def __post_init__(self) -> None:
        groups = -(-self.columns // self.group_size) if self.group_size > 0 else 0
        wanted = (self.codes.shape[0], packed_width(self.columns, self.bits))
        if self.codes.dtype != torch.uint8 or tuple(self.codes.shape) != wanted:
            raise ConfigError(f"affine codes {tuple(self.codes.shape)}: expected uint8 {wanted}")
        if self.scales.shape[-1] != groups or self.scales.shape[0] not in (1, wanted[0]):
            raise ConfigError(f"affine scales {tuple(self.scales.shape)}: expected {groups} groups")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight(self)

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """(codes uint8 [rows, columns], scales float32, zeros float32), grids [rows or 1, groups].

        Memory: one byte a weight while the caller holds it."""
        codes = unpack_bits(self.codes, self.bits, self.columns)
        scales = self.scales.float()
        if self.zeros is None:
            return codes, scales, torch.full_like(scales, float(2 ** (self.bits - 1)))
        return codes, scales, unpack_bits(self.zeros, self.bits, scales.shape[1]).float()

    def dequantize(self) -> Tensor:
        codes, scales, zeros = self.unpacked()
        scale = spread(scales, self.group_size, self.columns)
        zero = spread(zeros, self.group_size, self.columns)
        return codes.float().sub_(zero).mul_(scale)

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"codes": self.codes, "scales": self.scales}
        return tensors if self.zeros is None else {**tensors, "zeros": self.zeros}


def affine(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    *,
    scale_dtype: torch.dtype = torch.float16,
    activation: Activation | None = None,
) -> AffineWeight:
    """Pack float or integer codes [rows, columns] with their grids [rows or 1, groups]."""
    return AffineWeight(
        codes=pack_bits(codes, bits),
        scales=scale.to(scale_dtype).contiguous(),
        zeros=None if zero is None else pack_bits(zero, bits),
        bits=bits,
        group_size=group_size,
        columns=codes.shape[1],
        activation=activation,
    )


def affine_nbytes(rows: int, columns: int, bits: int, group_size: int, symmetric: bool) -> int:
    """Bytes of an AffineWeight with float16 scales and a grid a row and group, before it exists."""
    groups = -(-columns // group_size)
    zeros = 0 if symmetric else packed_width(groups, bits)
    return rows * (packed_width(columns, bits) + 2 * groups + zeros)


def static_inputs(packed: Mapping[str, object]) -> dict[str, dict[str, str | float]]:
    """Of weights by path, those whose input has one fixed step (`Activation` 'tensor'): which has
    the largest `step`, in which `layer`, and the `median` over all; {} where there are none.

    One record entry, `static_inputs`: a step far above the median is an outlier's.
    """
    steps = {
        path: weight.activation.scale
        for path, weight in packed.items()
        if isinstance(weight, AffineWeight)
        and weight.activation is not None
        and weight.activation.kind == "tensor"
    }
    if not steps:
        return {}
    layer = max(steps, key=steps.__getitem__)
    found: dict[str, str | float] = {
        "layer": layer,
        "step": steps[layer],
        "median": statistics.median(steps.values()),
    }
    return {"static_inputs": found}
