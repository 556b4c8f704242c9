"""AWQ: scale up the input channels that matter before rounding, then search the clipping.

For linears that read x through a foldable operation, channel scales s > 0 leave the function as it
is: (W s)(x / s) = W x, the 1/s folded into what produces x. AWQ takes s_j = mean|x_j|^r and picks
the exponent r by the output error. That error is computed from the second moment M of x,

    E||(Q(W s) / s - W) x||^2 = tr(D M D^T),   D = Q(W s) / s - W

so no candidate needs another run of the block. With M = L L^T that is ||D L||^2, a sum of squares,
which rounded factors hardly disturb. Then each group's range is shrunk where its own
output error, with M's diagonal block, is least.
Once the codes are fixed, each row's scales are refitted to them (`quantlab.grid.refit_scales`);
that is not in the paper.
Source: Lin et al. 2023, arXiv 2306.00978, sections 3.2 (equations 4 and 5) and 4.1 (clipping).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import native_solve
from quantlab.calibration import ActStats
from quantlab.errors import MethodError
from quantlab.grid import find_grid, from_codes, refit_scales, spread, to_codes
from quantlab.methods import base
from quantlab.models import Block, Fold, apply_fold, fold_scale
from quantlab.moments import bfloat16_factors
from quantlab.packing import PackedWeight, affine
from quantlab.texts import fast_bfloat16

DAMPING = 0.1
"""Share of the mean diagonal added to the second moment when scales are refitted: what a few tens
of thousands of tokens say of how channels hang together is not exact."""


@dataclass(frozen=True)
class AWQConfig(base.WeightConfig):
    bits: int = base.option(4, "Bits", "Bits a weight.", minimum=2, maximum=8)
    group_size: int = base.option(
        64, "Group size", "Weights that share one scale.", minimum=8, maximum=65536, paper="128"
    )
    symmetric: bool = base.option(
        False, "Symmetric", "Grid around zero; otherwise with a zero-point.", paper="false"
    )
    grid_points: int = base.option(
        20,
        "Search points",
        "Exponents tried between 0 (plain rounding) and 1.",
        minimum=2,
        maximum=100,
        paper="20",
    )
    scales: str = base.option(
        "activations",
        "Scales from",
        "'activations': mean|x|^r; 'both': also mean|x|^r / mean|w|^(1-r), which twice as many "
        "candidates make twice as slow to search.",
        choices=("activations", "both"),
        paper="activations; its authors' later code has the other form",
    )
    clip: bool = base.option(
        True, "Clip search", "Shrink each group's range to where its output error is least."
    )
    refit: bool = base.option(
        True,
        "Refit scales",
        "Once the codes are fixed, give each row the scales with the least output error for them.",
        paper="false",
    )


@base.register
class AWQ(base.Quantizer):
    name = "awq"
    title = "AWQ"
    paper = "arXiv 2306.00978"
    summary = "Protects the weights of large activations by channel scales that are folded away."
    bits = (4, 3)
    needs = ("second_moment", "mean")
    sees_error = (
        False  # As its authors' code has it; behind quantized blocks it came out no better.
    )
    Config = AWQConfig

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: AWQConfig
    ) -> dict[str, PackedWeight]:
        moments = {path: moment_of(stats[path]) for path in block.linears}
        for fold in block.folds:
            first = fold.targets[0]
            weights = [block.linears[target].weight for target in fold.targets]
            scale = search_scale(
                block, fold, torch.cat(weights).float(), moments[first], stats[first], config
            )
            apply_fold(block, fold, scale)
            for target in fold.targets:
                moments[target] = moments[target] / scale[:, None] / scale
        packed: dict[str, PackedWeight] = {}
        for path, linear in block.linears.items():
            weight = linear.weight.float()
            group = min(config.group_size, weight.shape[1])
            scale, zero = find_grid(
                weight,
                config.bits,
                group,
                symmetric=config.symmetric,
                clip=config.clip,
                moment=moments[path],
                scale_dtype=torch.float16,
            )
            columns = weight.shape[1]
            codes = to_codes(
                weight, spread(scale, group, columns), spread(zero, group, columns), config.bits
            )
            if config.refit:
                moment = moments[path]
                scale = refit_scales(weight, codes, scale, zero, group, moment, damping=DAMPING)
            stored_zero = None if config.symmetric else zero
            packed[path] = affine(codes, scale, stored_zero, config.bits, group)
        return packed


def moment_of(stats: ActStats) -> Tensor:
    """The second moment, checked. Raises: MethodError when it is not finite."""
    moment = stats.second_moment
    assert moment is not None
    if not bool(torch.isfinite(moment).all()):
        raise MethodError("awq: the calibration activations are not finite")
    return moment


def search_scale(
    block: Block, fold: Fold, weight: Tensor, moment: Tensor, stats: ActStats, config: AWQConfig
) -> Tensor:
    """The channel scale with the least output error: float32 [columns], geometric mid-range 1.

    weight: float32 [rows of all targets, columns]. Exponent 0 (no scaling) is among the candidates,
    so that the answer is never worse than plain rounding by this measure.
    """
    assert stats.mean_abs is not None
    importance = stats.mean_abs.clamp_min(1e-8)
    sizes = weight.abs().mean(0).clamp_min(1e-8)
    root = root_of(moment)
    best_loss, best = float("inf"), torch.ones_like(importance)
    for point in range(config.grid_points):
        exponent = point / config.grid_points
        forms = [importance.pow(exponent)]
        if config.scales == "both":
            forms.append(forms[0] / sizes.pow(1 - exponent))
        for scale in forms:
            scale = fold_scale(block, fold, scale / (scale.max() * scale.min()).sqrt())
            loss = output_error(weight, scale, root, config)
            if loss < best_loss:
                best_loss, best = loss, scale
    return best


def root_of(moment: Tensor) -> Tensor:
    """L, lower triangular, with L L^T = M and as little on its diagonal as that takes.

    Raises: MethodError when there is none."""
    mean = moment.diagonal().mean().clamp_min(1e-12)
    for share in (1e-6, 1e-4, 1e-2):
        raised = moment.clone()
        raised.diagonal().add_(share * mean)
        root, info = torch.linalg.cholesky_ex(raised)
        if int(info) == 0:
            return root
    raise MethodError("awq: the second moment of the activations has no root")


def output_error(weight: Tensor, scale: Tensor, root: Tensor, config: AWQConfig) -> float:
    """||D L||^2 with D = Q(W s) / s - W, plain rounding without clipping; root: L."""
    group = min(config.group_size, weight.shape[1])
    difference = rounding_error(weight, scale, group, config)
    with bfloat16_factors(fast_bfloat16()):
        return float((difference @ root).square_().sum())


def rounding_error(weight: Tensor, scale: Tensor, group: int, config: AWQConfig) -> Tensor:
    """D, float32 [rows, columns]."""
    if native_solve.ready(weight, scale):
        return native_solve.scaled_error(weight, scale, group, config.bits, config.symmetric)
    columns = weight.shape[1]
    scaled = weight * scale
    step, zero = find_grid(scaled, config.bits, group, symmetric=config.symmetric)
    step, zero = spread(step, group, columns), spread(zero, group, columns)
    difference = from_codes(to_codes(scaled, step, zero, config.bits), step, zero)
    return difference.sub_(scaled).div_(scale)
