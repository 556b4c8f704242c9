"""Triton's interpreter for the programs of kernels.gpu, for one test module at a time.

The environment variable TRITON_INTERPRET would have to be set before anything imports Triton, and
would then hold for every test of the process, also for those that compile. So the programs are
wrapped here instead, as Triton itself does under that variable, and unwrapped afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    """Programs of kernels.gpu run on the CPU, on CPU tensors, one after the other in numpy."""
    pytest.importorskip("triton")
    from triton import language
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
    from triton.runtime.jit import JITFunction

    from kernels.gpu import w4a16, w8a8

    with pytest.MonkeyPatch.context() as patch:

        def wrap(module: ModuleType) -> None:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, InterpretedFunction(value.fn))

        for module in (language, w4a16, w8a8):
            wrap(module)
        _repair(patch, InterpreterBuilder)
        yield


def _repair(patch: pytest.MonkeyPatch, builder: Any) -> None:
    """The interpreter keeps bfloat16 as 16 bits of an integer. Its casts cut off the lower bits of
    float32, where GPUs round to the nearest even, and its `dot` multiplies the bits themselves.
    Its products of whole numbers are right, but take numpy's slow way; float64 is exact as well."""
    from triton import language
    from triton.runtime.interpreter import TensorHandle

    cast, dot = builder.cast_impl, builder.create_dot

    def right_cast(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (language.float32, language.bfloat16):
            return cast(self, source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(even.astype(np.uint16), language.bfloat16)

    def right_dot(self: Any, a: Any, b: Any, start: Any, *rest: Any) -> Any:
        if a.dtype.scalar == language.int8:
            product = a.data.astype(np.float64) @ b.data.astype(np.float64)
            return TensorHandle(product.astype(np.int32) + start.data, language.int32)
        if a.dtype.scalar == language.bfloat16:
            a, b = (
                TensorHandle(
                    (factor.data.astype(np.uint32) << 16).view(np.float32), language.float32
                )
                for factor in (a, b)
            )
        return dot(self, a, b, start, *rest)

    patch.setattr(builder, "cast_impl", right_cast)
    patch.setattr(builder, "create_dot", right_dot)
