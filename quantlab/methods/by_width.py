"""One method on a block whose linears have different widths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantlab.calibration import ActStats
from quantlab.methods.base import Quantizer
from quantlab.models import Block, Fold
from quantlab.packing import PackedWeight


def quantize_by_width(
    block: Block,
    stats: Mapping[str, ActStats],
    bits: Mapping[str, int],
    method: Quantizer,
    configs: Mapping[int, Any],
    folds: bool,
) -> dict[str, PackedWeight]:
    """`method` on the linears of each width together; those of 16 bits are left out.

    `bits` of each path; `configs` by width. A method that `folds` gets the whole block first, at
    the fewest bits, where scales matter most; the linears of other widths are rounded afterwards
    as they were folded, on the statistics of their scaled inputs.
    """
    packed: dict[str, PackedWeight] = {}
    widths = sorted(set(bits.values()) - {16})
    if folds and block.folds and widths:
        before = fold_state(block)
        packed = dict(method.quantize_block(block, stats, configs[widths[0]]))
        stats = rescaled(stats, applied_scales(block, before))
    for width in widths:
        paths = [path for path in block.linears if bits[path] == width]
        if not packed or width != widths[0]:
            part = dataclasses.replace(
                block,
                linears={path: block.linears[path] for path in paths},
                kinds={path: block.kinds[path] for path in paths},
                folds=(),
            )
            given = {path: stats[path] for path in paths if path in stats}
            packed |= method.quantize_block(part, given, configs[width])
    return {path: packed[path] for path in block.linears if bits[path] != 16}


def fold_state(block: Block) -> dict[str, Tensor]:
    """What shows a fold's scale by its change: the norm's weight, or the target's columns."""
    return {fold.targets[0]: _witness(block, fold).clone() for fold in block.folds}


def applied_scales(block: Block, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The channel scale s > 0 (W s)(x / s) that folds have put on each target: float32 [columns].

    1 where the channel is dead and the scale cannot be seen, nor matter.
    """
    scales = {}
    for fold in block.folds:
        old, new = before[fold.targets[0]], _witness(block, fold)
        ratio = old / new if fold.kind == "norm" else new / old
        ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
        scales.update(dict.fromkeys(fold.targets, ratio.float()))
    return scales


def _witness(block: Block, fold: Fold) -> Tensor:
    if fold.kind == "norm":
        norm = block.module.get_submodule(fold.source).weight
        assert isinstance(norm, Tensor)
        return norm.detach() + block.norm_offset
    return block.linears[fold.targets[0]].weight.detach().float().norm(dim=0)


def rescaled(stats: Mapping[str, ActStats], scales: Mapping[str, Tensor]) -> dict[str, ActStats]:
    """Statistics of x / s; inputs that were shared stay shared."""
    done: dict[int, ActStats] = {}
    found = {}
    for path, stat in stats.items():
        scale = scales.get(path)
        if scale is None:
            found[path] = stat
            continue
        if id(stat) not in done:
            moment, mean = stat.second_moment, stat.mean_abs
            done[id(stat)] = dataclasses.replace(
                stat,
                second_moment=None if moment is None else moment / scale[:, None] / scale,
                mean_abs=None if mean is None else mean / scale,
            )
        found[path] = done[id(stat)]
    return found
