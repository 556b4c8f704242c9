"""Walkthrough 5: GPTQ, column by column.

The state after k columns is what `quantlab.compensation.compensate` gives when only the first k
rows of U pass their errors on: of the later ones just the diagonal is left, so that their columns
stand as the first k have left them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quantlab.compensation import compensate, inverse_factor
from quantlab.grid import find_grid, from_codes, spread, to_codes
from quantlab.learn.material import Slice, sub
from quantlab.methods.gptq import GPTQConfig, gptq

ROWS, COLUMNS = 16, 40
"""Of the slice that is shown column by column."""
DAMPING = 0.1


@dataclass(frozen=True, eq=False)
class Pull:
    """One column of the slice [columns]: `correlation` of its channel with each other one
    (uncentred), and the `share` of its rounding error by which each later column is changed,
    U_jk / U_jj. `taken` is how much of the error's harm that undoes, `strongest` the
    largest |correlation| with a later channel."""

    column: int
    correlation: Tensor
    share: Tensor
    taken: float
    strongest: float


def pull(one: Slice, column: int, damping: float) -> Pull:
    """Where an error of this column goes.

    Left alone, an error e costs H_jj e^2; with all later columns answering for it 1 / U_jj^2 e^2.
    """
    part = sub(one, ROWS, COLUMNS)
    moment = part.moment
    column = min(max(column, 0), moment.shape[0] - 2)
    upper = inverse_factor(moment, moment.diagonal() <= 0, damping)
    damped = float(moment[column, column]) + damping * float(moment.diagonal().mean())
    size = moment.diagonal().clamp_min(1e-12).sqrt()
    correlation = moment[column] / size / size[column]
    share = upper[column] / upper[column, column]
    share[column] = 0.0
    return Pull(
        column,
        correlation,
        share,
        1 - 1 / (float(upper[column, column]) ** 2 * damped),
        float(correlation[column + 1 :].abs().max()),
    )


@dataclass(frozen=True, eq=False)
class Step:
    """After `done` of the columns [rows, columns]: `values` are the weights as they stand (rounded
    where done, compensated where not), `pushed` = what compensation has added to each so far,
    `rounding` = the error of rounding where done, else 0. Errors are tr(D H D^T) / tr(W H W^T) of
    D = values - weight."""

    done: int
    values: Tensor
    pushed: Tensor
    rounding: Tensor
    error: float
    rtn_error: float


@dataclass(frozen=True, eq=False)
class Walk:
    """All steps of a slice, 0 to its number of columns, and both methods' codes at the end."""

    steps: tuple[Step, ...]
    codes: Tensor
    rtn_codes: Tensor


@lru_cache(maxsize=32)
def walk(one: Slice, bits: int, damping: float = DAMPING) -> Walk:
    """Every step of GPTQ on the first columns of the slice, with a zero-point grid a row."""
    part = sub(one, ROWS, COLUMNS)
    weight, moment = part.weight, part.moment
    columns = weight.shape[1]
    dead = moment.diagonal() <= 0
    upper = inverse_factor(moment, dead, damping)
    scale, zero = find_grid(weight, bits, columns, symmetric=False, scale_dtype=torch.float16)
    step, bottom = spread(scale, columns, columns), spread(zero, columns, columns)
    whole = float(((weight @ moment) * weight).sum())
    order = torch.arange(columns)

    def error(values: Tensor) -> float:
        difference = values - weight
        return float(((difference @ moment) * difference).sum()) / max(whole, 1e-30)

    rtn_codes = to_codes(weight, step, bottom, bits)
    rtn = from_codes(rtn_codes, step, bottom)
    steps = []
    codes = rtn_codes
    for done in range(columns + 1):
        passing = upper.clone()
        passing[done:] = torch.diag(upper.diagonal())[done:]
        found = compensate(weight, order, passing, (scale, zero), bits, columns)
        codes, compensated = found.codes, found.values()
        rounded = from_codes(codes, step, bottom)
        is_done = order < done
        values = torch.where(is_done, rounded, compensated)
        steps.append(
            Step(
                done,
                values,
                compensated - weight,
                torch.where(is_done, rounded - compensated, 0.0),
                error(values),
                error(torch.where(is_done, rtn, weight)),
            )
        )
    return Walk(tuple(steps), codes, rtn_codes)


@dataclass(frozen=True)
class Against:
    """Relative output error of the whole slice by plain rounding and by GPTQ as the method runs
    it, on the tokens it was fitted to and on tokens it has not seen."""

    rtn: float
    gptq: float
    rtn_unseen: float
    gptq_unseen: float


def against(one: Slice, bits: int, group_size: int, damping: float, act_order: bool) -> Against:
    """GPTQ fitted to every other token of the slice, beside plain rounding of the same groups."""
    group = min(group_size, one.weight.shape[1])
    seen = Slice(one.model, one.layer, one.shape, one.first, one.peak, one.weight, one.inputs[::2])
    unseen = Slice(
        one.model, one.layer, one.shape, one.first, one.peak, one.weight, one.inputs[1::2]
    )
    config = GPTQConfig(
        bits=bits,
        group_size=group,
        act_order=act_order,
        damp_percent=damping,
        gptaq="never",
    )
    columns = one.weight.shape[1]
    codes, scale, zero = gptq(one.weight, seen.moment, config)
    fitted = from_codes(codes.float(), spread(scale, group, columns), spread(zero, group, columns))
    scale, zero = find_grid(one.weight, bits, group, symmetric=False, scale_dtype=torch.float16)
    step, bottom = spread(scale, group, columns), spread(zero, group, columns)
    plain = from_codes(to_codes(one.weight, step, bottom, bits), step, bottom)
    return Against(
        seen.output_error(plain),
        seen.output_error(fitted),
        unseen.output_error(plain),
        unseen.output_error(fitted),
    )
