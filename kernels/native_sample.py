"""Drawing a token in C++ (`cpu/sample.cpp`)."""

from __future__ import annotations

from ctypes import c_double, c_int64

from torch import Tensor

from kernels import native


def sample(logits: Tensor, temperature: float, top_p: float, uniform: float) -> int:
    """As `kernels.reference.sample`, with weights and sums in float64 as there; logits: float32 on
    the CPU. Ask `native_solve.ready` first. Raises: ValueError."""
    settings = map(c_double, (temperature, top_p, uniform))
    logits = logits.contiguous()
    token = native.native()("ql_sample", logits, c_int64(logits.numel()), *settings)
    if token < 0:
        raise ValueError("the logits give no probabilities: one is NaN, or the largest infinite")
    return token
