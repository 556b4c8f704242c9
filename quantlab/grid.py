"""The arithmetic of uniform quantization grids: ranges, scales, zero-points, rounding.

A weight `w` (float32 `[rows, columns]`) is cut along its columns into groups of `group_size`; the
last group may be shorter. Each group of each row has a step `scale` and an integer `zero`:

    code = clamp(round(w / scale) + zero, 0, 2**bits - 1)        w ~ (code - zero) * scale

Symmetric (absmax) grids fix `zero = 2**(bits - 1)` and take the step from the largest magnitude;
asymmetric (zero-point) grids span [min, max] extended to contain 0.
Sources: Jacob et al. 2018 (arXiv 1712.05877, eq. 1-3); Dettmers et al. 2022 (arXiv 2208.07339, 2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import native_solve
from quantlab.errors import ConfigError

SHRINK = torch.linspace(1.0, 0.5, 41)
"""Candidate fractions of the full range that the clipping search tries."""

TINY = 1e-12
"""A step is never smaller, so that an all-zero group stays finite. Representable steps begin far
above it; a group this small is zero for every purpose."""


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: both extremes are finite, since NaN is passed on to
    them. Eight times as fast as `values.isfinite().all()`, which matters beside a quick format."""
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def by_group(
    weight: Tensor, group_size: int, fn: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Apply `fn` ([rows, groups, size] -> two tensors [rows, groups]) to whole groups and to the
    ragged rest, and join the answers along the groups. Raises: ConfigError for group_size < 1."""
    if group_size < 1:
        raise ConfigError(f"group_size={group_size}: needs at least 1")
    rows, columns = weight.shape
    whole = columns // group_size * group_size
    parts = []
    if whole:
        parts.append(fn(weight[:, :whole].reshape(rows, -1, group_size)))
    if whole < columns:
        parts.append(fn(weight[:, whole:].reshape(rows, 1, -1)))
    return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)


def spread(values: Tensor, group_size: int, columns: int) -> Tensor:
    """Per-group values [rows or 1, groups] repeated to every column: [rows or 1, columns]."""
    return values.repeat_interleave(group_size, dim=1)[:, :columns]


def range_to_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero) of the grid that spans [low, high]; `zero` is integral, both float32."""
    levels = 2**bits - 1
    if symmetric:
        # absmax: codes -(2^(b-1)-1) ... 2^(b-1)-1, so that +absmax is hit exactly.
        magnitude = torch.maximum(low.abs(), high.abs())
        scale = (magnitude / max(2 ** (bits - 1) - 1, 1)).clamp_min(TINY)
        return scale, torch.full_like(scale, float(2 ** (bits - 1)))
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / levels).clamp_min(TINY)
    zero = torch.round(-low / scale).clamp(0, levels)
    return scale, zero


def to_codes(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Integer codes (as float) of `weight` on broadcastable grids."""
    return torch.round(weight / scale).add_(zero).clamp_(0, 2**bits - 1)


def from_codes(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The meaning of codes: (code - zero) * scale."""
    return (codes - zero) * scale


def find_grid(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    clip: bool = False,
    moment: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Grids of every group of `weight`: (scale, zero), both float32 [rows, groups].

    With `clip`, each group's range is multiplied by the fraction in `SHRINK` that minimises the
    group's squared output error d M d^T, d = q(w) - w, where M is the group's diagonal block of
    `moment` (second moment of the inputs, float32 [columns, columns]); without `moment`, M = 1.
    Scales are rounded to `scale_dtype` before use, so that stored and searched grids are the same.
    """
    start = 0

    def solve(values: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal start
        count, size = values.shape[1:]
        blocks = None if moment is None else diagonal_blocks(moment, start, count, size)
        start += count * size
        if clip:
            return _clipped(values, blocks, bits, symmetric, scale_dtype)
        grid = range_to_grid(values.amin(-1), values.amax(-1), bits, symmetric)
        return _rounded(*grid, scale_dtype)

    return by_group(weight, group_size, solve)


CACHED = 2**18
"""Weights of a part whose clipping is searched at one time. Every candidate reads and writes the
part several times over, which pays only while it stays in the cores' own caches (2 MB each)."""
PART_ROWS = 1024
"""At most; more groups at a time serve as well as more rows."""


def _clipped(
    values: Tensor, blocks: Tensor | None, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The search of `find_grid`. values: [rows, groups, size]; blocks: [groups, size, size]; scale
    and zero: [rows, groups].

    Rows come last here, so that a group's scale lies along them and every operation runs over
    contiguous memory.
    """
    if native_solve.ready(values, blocks):
        matrix = None if blocks is None else blocks.contiguous()
        return native_solve.best_grids(values.contiguous(), matrix, SHRINK, bits, symmetric, dtype)
    rows, groups, size = values.shape
    scale, zero = values.new_empty(groups, rows), values.new_empty(groups, rows)
    high = max(min(rows, PART_ROWS, CACHED // size), 1)
    count = max(CACHED // (size * high), 1)
    for g in range(0, groups, count):
        matrix = None if blocks is None else blocks[g : g + count]
        for r in range(0, rows, high):
            part = values[r : r + high, g : g + count].permute(1, 2, 0).contiguous()
            s, z = _clipped_part(part, matrix, bits, symmetric, dtype)
            scale[g : g + count, r : r + high] = s
            zero[g : g + count, r : r + high] = z
    return scale.t().contiguous(), zero.t().contiguous()


def _clipped_part(
    values: Tensor, blocks: Tensor | None, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The best candidates of values [groups, size, rows]: scale and zero, both [groups, rows]."""
    scale, zero = _tries(values.amin(1), values.amax(1), bits, symmetric, dtype)
    # Zeros are whole numbers, so that clamp(round + zero) - zero is this clamp, exactly.
    bottom, top = -zero, 2**bits - 1 - zero
    negative, error, product = -values, torch.empty_like(values), torch.empty_like(values)
    loss = torch.empty_like(scale)
    for one, (s, lowest, highest) in enumerate(
        zip(scale[:, :, None], bottom[:, :, None], top[:, :, None], strict=True)
    ):
        torch.div(values, s, out=error).round_()
        torch.clamp(error, lowest, highest, out=error)
        torch.addcmul(negative, error, s, out=error)
        if blocks is None:
            product.copy_(error)
        else:
            torch.bmm(blocks, error, out=product)
        torch.sum(product.mul_(error), 1, out=loss[one])
    return _best(scale, zero, loss)


def _tries(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(scale, zero) [tries, groups, rows] of the ranges low to high [groups, rows], shrunk."""
    fractions = SHRINK[:, None, None]
    grid = range_to_grid(low * fractions, high * fractions, bits, symmetric)
    scale, zero = _rounded(*grid, dtype)
    return scale.contiguous(), zero.contiguous()


def _best(scale: Tensor, zero: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """The try with the least loss, all [tries, groups, rows]. Of equals the first, which is the
    widest range; one that is not a number is never best."""
    best = loss.nan_to_num_(nan=float("inf")).min(0, keepdim=True).indices
    return scale.gather(0, best)[0], zero.gather(0, best)[0]


def diagonal_blocks(moment: Tensor, start: int, count: int, size: int) -> Tensor:
    """`count` diagonal blocks of `moment` from index `start`: [count, size, size]."""
    index = (start + torch.arange(count * size)).reshape(count, size)
    return moment[index[:, :, None], index[:, None, :]]


def _rounded(scale: Tensor, zero: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype == torch.float32:
        return scale, zero
    tiny = torch.finfo(dtype).tiny
    return scale.clamp_min(tiny).to(dtype).float(), zero


ROW_SYSTEMS = 2**22
"""Numbers in the linear systems of `refit_scales` that are in memory at one time."""


def refit_scales(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_size: int,
    moment: Tensor,
    *,
    damping: float,
    scale_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """The steps that serve fixed codes best: float32 [rows, groups].

    With v_g the row's `code - zero` inside group g and 0 elsewhere, the row is sum_g s_g v_g, and
    its squared output error (w - sum_g s_g v_g) M (...)^T is least where

        sum_h (v_g M v_h^T) s_h = v_g M w^T        for every group g

    All arguments float32: weight, codes [rows, columns]; scale, zero [rows, groups]; moment
    [columns, columns], the inputs' second moment, to whose diagonal `damping` times its mean is
    added to make M. Rows keep their steps where the new ones, rounded to `scale_dtype`, are no
    better or are not positive.
    """
    columns, groups = weight.shape[1], scale.shape[1]
    moment = moment.clone(memory_format=torch.contiguous_format)
    moment.diagonal().add_(damping * float(moment.diagonal().mean()))
    member = torch.zeros(columns, groups)
    member[torch.arange(columns), torch.arange(columns) // group_size] = 1.0
    # The native products read `code - zero` as bfloat16: exact up to 8 bits.
    products = group_products
    if native_solve.ready(weight, codes, zero, moment) and native_solve.multiplies_bfloat16():
        products = native_solve.group_products
    refitted = []
    count = max(ROW_SYSTEMS // groups**2, 1)
    parts = [tensor.contiguous().split(count) for tensor in (weight, codes, scale, zero)]
    for w, c, s, z in zip(*parts, strict=True):
        system, right = products(w, c, z, moment, group_size)
        # A little weight on the old steps keeps every system solvable; groups of zeros stay so.
        share = torch.where(w.abs() @ member > 0, 1e-4, 1e6)
        ridge = share * system.diagonal(dim1=1, dim2=2) + TINY
        found = torch.linalg.solve(system + torch.diag_embed(ridge), right + ridge * s)
        found = found.to(scale_dtype).float()
        usable = (torch.isfinite(found) & (found >= torch.finfo(scale_dtype).tiny)).all(1)
        better = quadratic(system, right, found) < quadratic(system, right, s)
        refitted.append(torch.where((usable & better)[:, None], found, s))
    return torch.cat(refitted)


def group_products(
    weight: Tensor, codes: Tensor, zero: Tensor, moment: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """(v_g M v_h^T, v_g M w^T) of every row, as `refit_scales` defines them: float32 [rows, groups,
    groups] and [rows, groups]."""
    columns, groups = weight.shape[1], zero.shape[1]
    member = torch.zeros(columns, groups)
    member[torch.arange(columns), torch.arange(columns) // group_size] = 1.0
    values = codes - spread(zero, group_size, columns)
    right = (weight @ moment).mul_(values) @ member
    system = torch.empty(len(weight), groups, groups)
    for g in range(groups):
        first = g * group_size
        inside = slice(first, min(first + group_size, columns))
        seen = (values[:, inside] @ moment[inside, first:]).mul_(values[:, first:])
        # Symmetric: the groups before this one have had their turn.
        system[:, g, g:] = system[:, g:, g] = seen @ member[first:, g:]
    return system, right


def quadratic(system: Tensor, right: Tensor, s: Tensor) -> Tensor:
    """s A s^T - 2 b s^T of every row: float32 [rows]."""
    return ((system @ s[..., None]).squeeze(-1) * s).sum(-1) - 2 * (right * s).sum(-1)
