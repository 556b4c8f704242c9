"""GGUF files against llama.cpp, which loads them: logits, tokens, bytes, and what is refused."""

from __future__ import annotations

import math
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

from quantlab.blockwise import quantize_outer
from quantlab.errors import ConfigError, ModelError
from quantlab.export import gguf
from quantlab.export.gguf_tokenizer import CANDIDATES, PROBE, llama_tokens
from quantlab.ggml import FORMATS
from quantlab.ggml.mixes import FILE_TYPES
from quantlab.methods import METHODS
from quantlab.models import LoadedModel, block_list, get_block, load
from quantlab.packing import AffineWeight, GGMLWeight, PackedWeight, affine

from .conftest import ROWS, Make

Packed = dict[str, PackedWeight]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@torch.no_grad()
def pack(model: LoadedModel, file_type: str) -> tuple[Packed, Packed]:
    """Quantize as the method does and put the dequantized weights into the module."""
    method = METHODS["gguf"]
    config = method.Config(type=file_type)
    packed: Packed = {}
    for index in range(len(block_list(model.module, model.family))):
        block = get_block(model.module, model.family, index)
        for path, weight in method.quantize_block(block, {}, config).items():
            block.linears[path].weight.copy_(weight.dequantize())
            packed[f"{model.family.blocks}.{index}.{path}"] = weight
    outer = quantize_outer(model, method, config)
    model.module.get_input_embeddings().weight.copy_(outer["token_embd"].dequantize())
    if "output" in outer:
        model.module.get_output_embeddings().weight.copy_(outer["output"].dequantize())
    return packed, outer


def torch_logits(model: LoadedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(ids[None]).logits[0].float()


@contextmanager
def opened(path: Path, context: int = 256) -> Iterator[llama_cpp.Llama]:
    """In llama.cpp with float32 keys and values, one thread, logits of every token."""
    llama = llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=FORMATS["f32"].type_id,
        type_v=FORMATS["f32"].type_id,
        verbose=False,
    )
    try:
        yield llama
    finally:
        llama.close()


def llama_logits(path: Path, ids: Tensor) -> Tensor:
    with opened(path, len(ids)) as llama:
        llama.eval(ids.tolist())
        return torch.from_numpy(np.asarray(llama.scores[: len(ids)]).copy())


def window(length: int = 160) -> Tensor:
    return torch.randint(2, ROWS, (length,), generator=torch.Generator().manual_seed(3))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of the logits about their mean."""
    spread = (wanted - wanted.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((found - wanted).square().mean().sqrt() / spread)


def field(path: Path, key: str) -> Any:
    found = GGUFReader(str(path)).get_field(key)
    return None if found is None else found.contents()


MODELS = {
    "llama": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": ("llama", {"head_dim": 32}),
    "llama with llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama with linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama with yarn": ("llama", {"rope_parameters": YARN}),
    "llama with hot yarn": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.4}}),
    "mistral": ("mistral", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen2 with yarn": ("qwen2", {"rope_parameters": YARN}),
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 96}),
}


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_from_a_float_file(
    name: str, make: Make, tmp_path: Path
) -> None:
    """Both work in float32: what remains is the order of sums, a few units of 2^-24 a step and some
    hundred steps. ggml reads GELU from a table of float16, so GPT-2 may be off by its 2^-11."""
    family, config = MODELS[name]
    model = make(family, **config)
    packed, outer = pack(model, "f32")
    gguf.check(model)
    path = gguf.write(tmp_path / "model.gguf", model, packed, outer, "f32")
    ids = window()
    error = relative_error(llama_logits(path, ids), torch_logits(model, ids))
    assert error < (2**-10 if family == "gpt2" else 2**-16)
    names = set(gguf.read(path))
    assert ("output.weight" in names) == (config.get("tie_word_embeddings") is False)


@pytest.mark.parametrize(
    ("family", "file_type"),
    [
        ("llama", "q8_0"),
        ("gpt2", "q8_0"),
        ("qwen2", "q4_0"),
        ("llama", "q4_k_m"),
        ("llama", "iq4_nl"),
        ("llama", "bf16"),
        ("llama", "f16"),
    ],
)
def test_llama_cpp_computes_the_same_from_quantized_blocks(
    family: str, file_type: str, make: Make, tmp_path: Path
) -> None:
    """llama.cpp also rounds the inputs of every linear to 8 bits: by m / 254 at most, where m is
    the largest of 32 or 256 inputs, some 2 to 3 times their rms: rms 0.5 to 0.7% of it. Three
    blocks with four such roundings in a row and a head add up to 2.5% of the logits; twice that
    covers what softmax and products amplify. A wrong row order is off by 100%."""
    width = {"n_embd": 256} if family == "gpt2" else {"hidden_size": 256, "intermediate_size": 256}
    model = make(family, **width)
    scale = math.sqrt(64 / 256)  # as strong as the narrow models
    for parameter in model.module.parameters():
        if parameter.dim() > 1:
            parameter.mul_(scale)
    packed, outer = pack(model, file_type)
    path = gguf.write(tmp_path / "model.gguf", model, packed, outer, file_type)
    ids = window()
    error = relative_error(llama_logits(path, ids), torch_logits(model, ids))
    print(family, file_type, error)
    assert error < 0.05
