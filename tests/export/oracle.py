"""A model quantized for a GGUF file, in torch and in llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from gguf import GGUFReader
from torch import Tensor

from quantlab.blockwise import quantize_outer
from quantlab.ggml import FORMATS, dequantize_rows, quantize_rows
from quantlab.methods import METHODS
from quantlab.models import LoadedModel, block_list, get_block
from quantlab.packing import GGMLWeight, PackedWeight

from .conftest import ROWS

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


class TableGELU(torch.nn.Module):
    """GELU as ggml reads it from a table: float16 in and out."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.gelu(x.half().float(), approximate="tanh")
        return y.half().float()


def use_table(model: LoadedModel) -> bool:
    """Give a model with GELU ggml's; whether it has it."""
    found = False
    for module in model.module.modules():
        for name in ("act_fn", "act"):
            if "GELU" in type(getattr(module, name, None)).__name__:
                setattr(module, name, TableGELU())
                found = True
    return found


def round_input(x: Tensor, kind: str) -> Tensor:
    """What ggml makes of the input of a linear whose weight has that format."""
    if kind in ("f16", "bf16"):
        return x.to({"f16": torch.float16, "bf16": torch.bfloat16}[kind]).float()
    if FORMATS[kind].block_size == 32:
        rows = x.reshape(-1, x.shape[-1])
        return dequantize_rows(quantize_rows(rows, "q8_0"), "q8_0", x.shape[-1]).view_as(x)
    blocks = x.unflatten(-1, (-1, 256))  # q8_K: its step is a float32
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / step).round() * step).flatten(-2)


@contextmanager
def rounded_inputs(model: LoadedModel, packed: Packed, outer: Packed) -> Iterator[None]:
    """The module rounds the inputs of its packed linears as ggml does."""
    weights = {**packed, "lm_head": outer.get("output", outer["token_embd"])}
    handles = []
    for path, weight in weights.items():
        assert isinstance(weight, GGMLWeight)

        def hook(_: Any, args: tuple[Tensor], kind: str = weight.type) -> Tensor:
            return round_input(args[0], kind)

        handles.append(model.module.get_submodule(path).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
