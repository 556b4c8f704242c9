"""Round to nearest: every weight to the closest point of its own grid, no data needed.

zero-point:  scale = (max - min) / (2**b - 1), zero = round(-min / scale)
absmax:      scale = max|w| / (2**(b-1) - 1), zero in the middle
Source: the baseline of arXiv 2208.07339 (section 2) and arXiv 2210.17323.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantlab.calibration import ActStats
from quantlab.grid import find_grid, spread, to_codes
from quantlab.methods import base
from quantlab.models import Block
from quantlab.packing import AffineWeight, PackedWeight, Storage, affine


@dataclass(frozen=True)
class RTNConfig(base.WeightConfig):
    bits: int = base.option(4, "Bits", "Bits a weight.", minimum=2, maximum=8)
    granularity: str = base.option(
        "group",
        "Granularity",
        "What shares one scale: a group of a row's weights, a whole row, or the whole tensor.",
        choices=("group", "channel", "tensor"),
    )
    group_size: int = base.option(
        64, "Group size", "Weights that share one scale.", minimum=8, maximum=65536
    )
    symmetric: bool = base.option(
        False, "Symmetric (absmax)", "Grid around zero; otherwise from minimum to maximum."
    )
    clip: bool = base.option(
        False, "MSE clipping", "Shrink each range to where the squared weight error is least."
    )


@base.register
class RTN(base.Quantizer):
    name = "rtn"
    title = "Round to nearest"
    paper = "baseline of arXiv 2208.07339 and 2210.17323"
    summary = "Rounds each weight to its nearest grid point; needs no data."
    bits = (4, 2, 3, 5, 6, 7, 8)
    Config = RTNConfig

    def storage(self, config: RTNConfig) -> Storage:
        group = config.group_size if config.granularity == "group" else None
        whole = config.granularity == "tensor"
        return dataclasses.replace(super().storage(config), group_size=group, one_scale=whole)

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: RTNConfig
    ) -> dict[str, PackedWeight]:
        return {path: round_weight(m.weight, config) for path, m in block.linears.items()}


def round_weight(weight: torch.Tensor, config: RTNConfig) -> AffineWeight:
    """The packed weight (float [rows, columns] -> AffineWeight) that rounding gives."""
    weight = weight.float()
    columns = weight.shape[1]
    group = min(config.group_size, columns) if config.granularity == "group" else columns
    grouped = weight.reshape(1, -1) if config.granularity == "tensor" else weight
    scale, zero = find_grid(
        grouped,
        config.bits,
        grouped.shape[1] if config.granularity == "tensor" else group,
        symmetric=config.symmetric,
        clip=config.clip,
        scale_dtype=torch.float16,
    )
    codes = to_codes(
        weight, spread(scale, group, columns), spread(zero, group, columns), config.bits
    )
    return affine(codes, scale, None if config.symmetric else zero, config.bits, group)
