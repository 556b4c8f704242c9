"""The oracle of these tests: llama.cpp's own quantizer, called in its library."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantlab.ggml import FORMATS

LlamaQuantize = Callable[[Tensor, str, Tensor | None], Tensor]


@pytest.fixture(scope="session")
def llama_quantize() -> LlamaQuantize:
    """`(weight [rows, columns], format, importance [columns] or None) -> uint8 [rows, bytes]`."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    library = ctypes.CDLL(str(next(folder.glob("libggml-base.[sd]*"))))
    quantize_chunk = library.ggml_quantize_chunk
    quantize_chunk.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]

    def quantize(weight: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
        entry = FORMATS[name]
        weight = weight.to(torch.float32).contiguous()
        rows, columns = weight.shape
        data = torch.zeros(rows, columns // entry.block_size * entry.block_bytes, dtype=torch.uint8)
        if importance is not None:
            importance = importance.to(torch.float32).contiguous()
        written = quantize_chunk(
            entry.type_id,
            weight.data_ptr(),
            data.data_ptr(),
            0,
            rows,
            columns,
            None if importance is None else importance.data_ptr(),
        )
        assert written == data.numel()
        return data

    return quantize
