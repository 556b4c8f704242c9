"""Which tensor gets which format, against llama.cpp quantizing small random models.

llama.cpp looks at names, shapes and the header only, so every matrix here has two rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf.constants import LlamaFileType

from quantlab.errors import ConfigError
from quantlab.ggml import FORMATS
from quantlab.ggml.mixes import FILE_TYPES, TENSOR_KINDS, tensor_type

ROWS = 2


@dataclass(frozen=True)
class Model:
    """The header of a model, as far as a mix looks at it."""

    width: int
    feed_forward: int
    blocks: int
    heads: int
    kv_heads: int
    tied: bool
    fused: bool = False

    def __str__(self) -> str:
        parts = f"{self.blocks}x{self.width}-{self.feed_forward}-{self.heads}:{self.kv_heads}"
        return parts + "-tied" * self.tied + "-fused" * self.fused

    def columns(self, kind: str) -> int:
        return self.feed_forward if kind == "ffn_down" else self.width

    def tensors(self) -> dict[str, tuple[str, int]]:
        """GGUF name -> kind, block."""
        found = {"token_embd.weight": ("token_embd", 0)}
        if not self.tied:
            found["output.weight"] = ("output", 0)
        attention = ("attn_qkv",) if self.fused else ("attn_q", "attn_k", "attn_v")
        for block in range(self.blocks):
            for kind in (*attention, "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
                found[f"blk.{block}.{kind}.weight"] = (kind, block)
        return found


MODELS = [
    Model(576, 1536, 8, 9, 3, tied=True),  # the shape of SmolLM2-135M
    Model(576, 1536, 30, 9, 9, tied=False),
    Model(512, 1408, 8, 8, 2, tied=True),  # feed-forward width divides by 32 only
    Model(512, 1536, 17, 8, 2, tied=False),
    Model(512, 80, 8, 8, 4, tied=False),  # feed-forward width does not divide by 32
    Model(256, 512, 80, 8, 1, tied=False),  # llama.cpp takes this for a 70B model
    Model(256, 512, 80, 8, 8, tied=True),
    Model(512, 1024, 12, 8, 8, tied=False, fused=True),
]

Quantize = Callable[[Model, str, bool], dict[str, str]]


def _write(model: Model, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(model.width)
    writer.add_block_count(model.blocks)
    writer.add_feed_forward_length(model.feed_forward)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(LlamaFileType.ALL_F32)
    random = np.random.default_rng(1)
    for name, (kind, _) in model.tensors().items():
        values = random.normal(0, 0.05, (ROWS, model.columns(kind))).astype(np.float32)
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _importance(model: Model) -> ctypes.Array[llama_cpp.llama_model_imatrix_data]:
    entries = []
    for name, (kind, _) in model.tensors().items():
        columns = model.columns(kind)
        values = (ctypes.c_float * columns)(*[1.0] * columns)
        entries.append(llama_cpp.llama_model_imatrix_data(name.encode(), values, columns))
    entries.append(llama_cpp.llama_model_imatrix_data(None, None, 0))
    return (llama_cpp.llama_model_imatrix_data * len(entries))(*entries)


@pytest.fixture(scope="module")
def llama_types(tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    """The type llama.cpp gives every tensor of a model: name -> format."""
    folder = tmp_path_factory.mktemp("mixes")

    @cache
    def source(model: Model) -> Path:
        path = folder / f"{model}.gguf"
        _write(model, path)
        return path

    def quantize(model: Model, mix: str, importance: bool) -> dict[str, str]:
        params = llama_cpp.llama_model_quantize_default_params()
        params.nthread, params.ftype = 1, FILE_TYPES[mix].ftype
        data = _importance(model) if importance else None
        if data is not None:
            params.imatrix = data
        target = folder / "out.gguf"
        code = llama_cpp.llama_model_quantize(
            str(source(model)).encode(), str(target).encode(), ctypes.byref(params)
        )
        assert code == 0
        reader = gguf.GGUFReader(target)
        assert reader.fields["general.file_type"].contents() == FILE_TYPES[mix].ftype
        return {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}

    return quantize


def _ours(model: Model, mix: str, importance: bool) -> dict[str, str]:
    return {
        name: tensor_type(
            mix,
            kind,
            block,
            model.blocks,
            model.columns(kind),
            ROWS,
            gqa=model.heads // model.kv_heads,
            tied_head=model.tied,
            importance=importance,
        )
        for name, (kind, block) in model.tensors().items()
    }


def _llama_refuses(model: Model, mix: str, importance: bool) -> bool:
    base = FORMATS[FILE_TYPES[mix].base]
    # It has no fallback for a width that is not a multiple of 32 except from the K formats, ...
    if model.feed_forward % 32 and base.block_size == 32:
        return True
    # ... and wants importance for two bits.
    return mix == "q2_k_s" and not importance


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("mix", list(FILE_TYPES))
def test_types_are_those_of_llama_cpp(mix: str, model: Model, llama_types: Quantize) -> None:
    for importance in (False, True):
        ours = _ours(model, mix, importance)
        if _llama_refuses(model, mix, importance):
            continue
        theirs = llama_types(model, mix, importance)
        assert ours.keys() == theirs.keys()
        different = {
            name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]
        }
        assert not different, importance


def test_smollm2_as_q4_k_m() -> None:
    """Width 576: K formats fall back everywhere but in ffn_down (1536)."""
    types = _ours(MODELS[0], "q4_k_m", False)
    assert types["token_embd.weight"] == "q8_0"
    assert types["blk.0.attn_q.weight"] == "q5_0"
    assert types["blk.0.attn_v.weight"] == "q8_0"
    assert types["blk.0.ffn_down.weight"] == "q6_k"
    assert types["blk.1.ffn_down.weight"] == "q4_k"


def test_file_types_are_those_of_gguf() -> None:
    numbers = {entry.name.removeprefix("MOSTLY_").lower(): entry.value for entry in LlamaFileType}
    numbers["f32"] = numbers.pop("all_f32")
    for name, entry in FILE_TYPES.items():
        assert entry.name == name
        assert entry.ftype == numbers[name]
        assert entry.bits == FORMATS[entry.base].bits
        assert entry.description


@pytest.mark.parametrize("mix", list(FILE_TYPES))
def test_the_type_always_fits(mix: str) -> None:
    for kind, columns, block in product(TENSOR_KINDS, (2048, 576, 80, 17), range(4)):
        name = tensor_type(mix, kind, block, 4, columns, 8, gqa=4, tied_head=True)
        assert columns % FORMATS[name].block_size == 0, (kind, columns)
        if columns % 32:
            assert name == (mix if mix in ("f32", "bf16") else "f16")


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="unknown GGUF type 'q4_k'; known: f32, "):
        tensor_type("q4_k", "attn_q", 0, 8, 512, 512, gqa=1, tied_head=False)
    with pytest.raises(ConfigError, match="unknown tensor kind 'wq'; known: token_embd, "):
        tensor_type("q4_0", "wq", 0, 8, 512, 512, gqa=1, tied_head=False)
