"""Packed weights in the native kernels' layout."""

from __future__ import annotations

import torch

from kernels import native
from kernels.native_linear import NativeLinear
from quantlab.operands import operands_of, problem_of
from quantlab.packing import PackedWeight


def native_form(weight: PackedWeight) -> str | None:
    """Why this weight has no native form, None where it has."""
    problem = problem_of(weight, "cpu", torch.float32)
    if isinstance(problem, str):
        return problem.replace("no kernel", "no native layout")
    rows_share = problem.group_size >= problem.columns
    if not rows_share and problem.group_size % 4:
        return f"no native layout for groups of {problem.group_size}: no multiple of 4"
    bytes_a_row = problem.bits == 8 and problem.symmetric and rows_share
    if problem.activation is not None and not bytes_a_row:
        return "no native layout for 8-bit inputs but with symmetric 8-bit rows"
    return None


def matrix_of(weight: PackedWeight) -> tuple[native.Matrix, native.How | None]:
    """The weight, and how its input enters where the weight says so (None: as the caller likes).

    Raises: NotImplementedError for a weight that has no native form.
    """
    if reason := native_form(weight):
        raise NotImplementedError(reason)
    problem = problem_of(weight, "cpu", torch.float32)
    assert not isinstance(problem, str)
    layer = NativeLinear(problem, operands_of(weight))
    return layer.matrix, None if problem.activation is None else layer.how
