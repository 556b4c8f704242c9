"""GPTQ: quantize column by column, and push each column's error into the columns not yet done.

With inputs x, the layer's squared output error for a change d of a weight row is d H d^T, H the
second moment of x. Fixing column j at its rounded value and minimising over the later columns gives

    d_later = -(w_j - q_j) / U_jj * U_j,later        U = upper Cholesky factor of H^-1

Source: Frantar et al. 2022, arXiv 2210.17323, section 3 and algorithm 1 (lazy blocks, Cholesky).

Asymmetric calibration (GPTAQ) aims at the output that the unquantized model has at this place: its
linear reads y where this one, behind quantized blocks, reads x. Of

    q x - w y = (q - w) x - w (y - x)

column j owes the part  w_j (y_j - x_j),  and the columns F after it answer for it best with

    d_F = w_j E[(y_j - x_j) x_F^T] (H_FF)^-1 = w_j P_jF        P = triu((C - H) U^T, 1) U

where C = E[y x^T] and (H_FF)^-1 = U_FF^T U_FF.
Source: Li et al. 2025, arXiv 2504.02692, section 4 and algorithm 1.
The weight is worked on transposed, so that a column is contiguous in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.calibration import ActStats, StatKind
from quantlab.compensation import compensate, inverse_factor
from quantlab.errors import ConfigError, MethodError
from quantlab.grid import all_finite, find_grid, refit_scales
from quantlab.heap import hand_back_after
from quantlab.methods import base
from quantlab.models import Block
from quantlab.packing import PackedWeight, affine


@dataclass(frozen=True)
class GPTQConfig(base.WeightConfig):
    bits: int = base.option(4, "Bits", "Bits a weight.", minimum=2, maximum=8)
    group_size: int = base.option(
        64, "Group size", "Weights that share one scale.", minimum=8, maximum=65536, paper="128"
    )
    symmetric: bool = base.option(
        False, "Symmetric", "Grid around zero; otherwise with a zero-point.", paper="false"
    )
    act_order: bool = base.option(
        True,
        "Act-order",
        "Quantize the columns with the largest activations first, while most others are still "
        "free to compensate.",
        paper="added by its authors' code after the paper",
    )
    static_groups: bool = base.option(
        True,
        "Static groups",
        "Fix every group's grid before any column is changed; act-order needs it, so that groups "
        "stay contiguous.",
    )
    clip: bool = base.option(
        True, "MSE clipping", "Shrink each group's range to where its output error is least."
    )
    refit: bool = base.option(
        True,
        "Refit scales",
        "Once the codes are fixed, give each row the scales with the least output error for them.",
        paper="false",
    )
    damp_percent: float = base.option(
        0.1,
        "Damping",
        "Fraction of the mean diagonal added to H before it is inverted.",
        minimum=1e-4,
        maximum=10.0,
        step=0.01,
        paper="0.01",
    )
    damping: str = base.option(
        "mean",
        "Damping spread",
        "'mean' adds the same to every channel; 'channel' a share of each channel's own size, "
        "which a few massive activations cannot swamp.",
        choices=("mean", "channel"),
        paper="mean",
    )
    gptaq: str = base.option(
        "auto",
        "Asymmetric calibration",
        "Aim at what the unquantized model computes here, not at this layer's own output behind "
        "the quantized blocks (GPTAQ); takes a second forward pass. 'auto': at 2 and 3 bits, where "
        "it pays, with static groups.",
        choices=("auto", "always", "never"),
        paper="always in GPTAQ's, never in GPTQ's",
    )
    gptaq_strength: float = base.option(
        0.25,
        "Asymmetric strength",
        "Share of GPTAQ's correction that is applied.",
        minimum=0.0,
        maximum=1.0,
        step=0.05,
        paper="1; its authors' code 0.25",
    )

    @property
    def asymmetric(self) -> bool:
        """Whether GPTAQ's correction is applied."""
        if self.gptaq == "auto":
            return self.bits <= 3 and self.static_groups
        return self.gptaq == "always"

    def validate(self) -> None:
        super().validate()
        if self.gptaq == "always" and not self.static_groups:
            raise ConfigError("gptaq=always needs static_groups=true")
        if self.act_order and not self.static_groups:
            raise ConfigError("act_order=true needs static_groups=true")


@base.register
class GPTQ(base.Quantizer):
    name = "gptq"
    title = "GPTQ"
    paper = "arXiv 2210.17323"
    summary = "Compensates each column's rounding error in the columns after it, by second moments."
    bits = (4, 2, 3, 8)
    needs = ("second_moment",)
    sequential = True
    Config = GPTQConfig

    def needs_for(self, config: GPTQConfig) -> tuple[StatKind, ...]:
        return (*self.needs, "cross_moment") if config.asymmetric else self.needs

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: GPTQConfig
    ) -> dict[str, PackedWeight]:
        packed: dict[str, PackedWeight] = {}
        for paths in shared_inputs(stats):
            # Rows never interact, so linears with the same input are one taller matrix.
            weight = torch.cat([block.linears[path].weight for path in paths]).float()
            moment = stats[paths[0]].second_moment
            assert moment is not None
            rows = [block.linears[path].weight.shape[0] for path in paths]
            codes, scale, zero = gptq(weight, moment, config, stats[paths[0]].cross_moment)
            group = min(config.group_size, weight.shape[1])
            for path, c, s, z in zip(
                paths, codes.split(rows), scale.split(rows), zero.split(rows), strict=True
            ):
                stored_zero = None if config.symmetric else z
                packed[path] = affine(c, s, stored_zero, config.bits, group)
        return packed


def shared_inputs(stats: Mapping[str, ActStats]) -> list[list[str]]:
    """Paths of linears, those that read the same input together."""
    groups: dict[int, list[str]] = {}
    for path, value in stats.items():
        groups.setdefault(id(value), []).append(path)
    return list(groups.values())


def rearranged(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of a square matrix in this order."""
    if torch.equal(order, torch.arange(len(order))):
        return matrix
    return matrix.index_select(0, order).index_select(1, order)


def gptq(
    weight: Tensor, moment: Tensor, config: GPTQConfig, cross: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [rows, columns], scale, zero float32 [rows, groups]) of one matrix.

    weight: float32 [rows, columns]; moment: float32 [columns, columns], mean of x x^T; cross: mean
    of y x^T, needed and read where `config.asymmetric`.
    Raises: MethodError when a moment is not finite.
    """
    for value in (moment, cross if config.asymmetric else None):
        if value is not None and not all_finite(value):
            raise MethodError("gptq: the calibration activations are not finite")
    columns = weight.shape[1]
    group = min(config.group_size, columns)
    dead = moment.diagonal() <= 0
    if bool(dead.any()):
        weight = weight.masked_fill(dead, 0.0)
    order = torch.arange(columns)
    if config.act_order:
        order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    upper = inverse_factor(
        rearranged(moment, order), dead[order], config.damp_percent, config.damping == "channel"
    )
    debt = None
    if config.asymmetric:
        assert cross is not None
        ahead = rearranged(cross - moment, order) * config.gptaq_strength
        debt = (ahead @ upper.t()).triu_(1) @ upper

    def grid(values: Tensor, first: int) -> tuple[Tensor, Tensor]:
        last = first + values.shape[1]
        return find_grid(
            values,
            config.bits,
            group,
            symmetric=config.symmetric,
            clip=config.clip,
            moment=moment[first:last, first:last],
            scale_dtype=torch.float16,
        )

    rows = weight.shape[0]
    groups = -(-columns // group)
    scale, zero = grid(weight, 0) if config.static_groups else (torch.empty(rows, groups),) * 2
    found = compensate(
        weight,
        order,
        upper,
        (scale, zero),
        config.bits,
        group,
        regrid=None if config.static_groups else grid,
        debt=debt,
    )
    codes, scale, zero = found.codes, found.scale, found.zero
    del upper, debt, found  # As large as the moment; the refit has room for its own.
    hand_back_after(columns)
    if config.refit:
        damping = config.damp_percent
        scale = refit_scales(weight, codes, scale, zero, group, moment, damping=damping)
        hand_back_after(columns)
    return codes.to(torch.uint8), scale, zero
