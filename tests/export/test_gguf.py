"""GGUF files against llama.cpp, which loads them: logits, bytes and metadata."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from quantlab.blockwise import quantize_blocks, quantize_outer
from quantlab.export import gguf
from quantlab.export.gguf_tokenizer import llama_tokens
from quantlab.ggml.mixes import FILE_TYPES
from quantlab.methods import METHODS
from quantlab.models import LoadedModel, load
from quantlab.models.gguf_header import read_header
from quantlab.packing import GGMLWeight, PackedWeight

from .conftest import ROWS, TEXTS, Make
from .oracle import (
    LINEAR,
    LLAMA3_ROPE,
    YARN,
    Packed,
    field,
    llama_logits,
    opened,
    pack,
    relative_error,
    rounded_inputs,
    torch_logits,
    use_table,
    window,
)

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
    "qwen3": ("qwen3", {}),
    "qwen3 with yarn": ("qwen3", {"rope_parameters": YARN, "tie_word_embeddings": False}),
    "smollm3": ("smollm3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "gemma3 untied, stretched": (
        "gemma3",
        {
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {}),
    "phi3 with half its heads rotated": (
        "phi3",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "pythia": ("neox", {}),
    "gpt-neox in turn": ("neox", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 96}),
}


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_from_a_float_file(
    name: str, make: Make, tmp_path: Path
) -> None:
    """Both work in float32: what remains is the order of sums, a few units of 2^-24 a step and some
    hundred steps. Where ggml reads GELU from a table of float16, so does torch here, and inputs
    that such sums push over to the next float16 are off by its 2^-11."""
    family, config = MODELS[name]
    model = make(family, **config)
    packed, outer = pack(model, "f32")
    gguf.check(model)
    path = gguf.write(tmp_path / "model.gguf", model, packed, outer, "f32")
    ids = window()
    tolerance = 2**-11 if use_table(model) else 2**-16
    assert relative_error(llama_logits(path, ids), torch_logits(model, ids)) < tolerance
    names = set(gguf.read(path))
    assert ("output.weight" in names) != model.module.config.tie_word_embeddings


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
    """llama.cpp also rounds the inputs of every linear, to 8 bits or to half precision, which alone
    moves these logits by 1 to 3%. With that done in torch too, sums in another order remain, and
    the inputs that these push over to the next code. A step is about 2% of a typical input, so one
    code in a hundred in each of five roundings makes 0.45%; GELU's table of float16 moves several
    times as many. (One block: in deeper models such flips breed more.)"""
    config = {"n_embd": 256, "n_layer": 1}
    if family != "gpt2":
        config = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model = make(family, **config)
    scale = math.sqrt(64 / 256)  # as strong as the narrow models
    for parameter in model.module.parameters():
        if parameter.dim() > 1:
            parameter.mul_(scale)
    packed, outer = pack(model, file_type)
    path = gguf.write(tmp_path / "model.gguf", model, packed, outer, file_type)
    ids = window()
    found, plain = llama_logits(path, ids), torch_logits(model, ids)
    with rounded_inputs(model, packed, outer):
        rounded = torch_logits(model, ids)
    assert relative_error(found, rounded) < (0.01 if family == "gpt2" else 0.0045)
    assert relative_error(found, plain) < 0.05


def test_what_is_read_is_what_was_written(make: Make, tmp_path: Path) -> None:
    """Exact bytes; q and k in ggml's row order, spelled out here for heads of 16 channels."""
    model = make("llama", tie_word_embeddings=False)
    packed, outer = pack(model, "q4_k_m")
    path = gguf.write(tmp_path / "model.gguf", model, packed, outer, "q4_k_m")
    found = gguf.read(path)

    def same(name: str, weight: PackedWeight, rows: list[int] | slice = slice(None)) -> None:
        assert isinstance(weight, GGMLWeight)
        assert (found[name].type, found[name].columns) == (weight.type, weight.columns)
        assert torch.equal(found[name].data, weight.data[rows])

    head = [row for pair in range(8) for row in (pair, pair + 8)]
    for index in range(3):
        at = f"model.layers.{index}"
        queries = [16 * number + row for number in range(4) for row in head]
        same(f"blk.{index}.attn_q.weight", packed[f"{at}.self_attn.q_proj"], queries)
        same(f"blk.{index}.attn_k.weight", packed[f"{at}.self_attn.k_proj"], queries[:32])
        same(f"blk.{index}.attn_v.weight", packed[f"{at}.self_attn.v_proj"])
        same(f"blk.{index}.attn_output.weight", packed[f"{at}.self_attn.o_proj"])
        same(f"blk.{index}.ffn_gate.weight", packed[f"{at}.mlp.gate_proj"])
        same(f"blk.{index}.ffn_up.weight", packed[f"{at}.mlp.up_proj"])
        same(f"blk.{index}.ffn_down.weight", packed[f"{at}.mlp.down_proj"])
        norm = model.module.model.layers[index].input_layernorm.weight
        assert torch.equal(found[f"blk.{index}.attn_norm.weight"].dequantize()[0], norm)
    same("token_embd.weight", outer["token_embd"])
    same("output.weight", outer["output"])
    assert gguf.weight_bytes(path) == sum(weight.nbytes for weight in found.values())
    assert len(found) == 3 * 9 + 3


def test_header_agrees_with_the_gguf_package(make: Make, tmp_path: Path) -> None:
    model = make("llama", rope_parameters=LLAMA3_ROPE)
    path = gguf.write(tmp_path / "model.gguf", model, *pack(model, "q8_0"), "q8_0")
    header, reader = read_header(path), GGUFReader(str(path))
    for key, found in header.fields.items():
        wanted = reader.get_field(key)
        assert wanted is not None
        assert [int(kind) for kind in wanted.types[:1] + wanted.types[-1:]] == [
            found.kind,
            found.inner,
        ]
        contents = wanted.contents() if found.kind == 9 else [wanted.contents()]
        values = [value.decode() if isinstance(value, bytes) else value for value in found.values]
        assert values == contents
    assert len(header.fields) + 3 == len(reader.fields)  # the reader counts version and sizes
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(tensor.shape)
        assert (info.type_id, info.start, info.size) == (
            int(tensor.tensor_type),
            int(tensor.data_offset),
            int(tensor.n_bytes),
        )


def test_metadata(make: Make, tmp_path: Path) -> None:
    model = make("mistral", "llama-bpe", sliding_window=96, head_dim=32)
    path = gguf.write(tmp_path / "model.gguf", model, *pack(model, "q4_k_s"), "q4_k_s")
    wanted = {
        "general.architecture": "llama",
        "general.name": "mistral",
        "general.file_type": FILE_TYPES["q4_k_s"].ftype,
        "general.quantization_version": 2,
        "llama.block_count": 3,
        "llama.context_length": 96,  # llama.cpp sees everything: equal within the window only
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": ROWS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": model.tokenizer.chat_template,
    }
    assert {key: field(path, key) for key in wanted} == wanted
    epsilon = field(path, "llama.attention.layer_norm_rms_epsilon")
    assert epsilon == pytest.approx(model.module.config.rms_norm_eps)
    tokens, types = field(path, "tokenizer.ggml.tokens"), field(path, "tokenizer.ggml.token_type")
    assert len(model.tokenizer) < len(tokens) == len(types) == ROWS
    assert (types[0], types[5], types[-1], tokens[-1]) == (3, 1, 5, f"[PAD{ROWS - 1}]")


def test_quantized_layers_in_place_give_the_same_file(make: Make, tmp_path: Path) -> None:
    """As in a comparison: the module holds QuantLinears, whose biases and weights are written."""
    model = make("qwen2")
    plain = gguf.write(tmp_path / "plain.gguf", model, *pack(model, "q8_0"), "q8_0")
    method = METHODS["gguf"]
    config = method.Config(type="q8_0")
    packed = quantize_blocks(model, method, config, None, lambda done, total: None)
    outer = quantize_outer(model, method, config)
    assert plain.read_bytes() == _written(tmp_path / "a.gguf", model, packed, outer)
    assert plain.read_bytes() == _written(tmp_path / "b.gguf", model, {}, outer)


def _written(path: Path, model: LoadedModel, packed: Packed, outer: Packed) -> bytes:
    return gguf.write(path, model, packed, outer, "q8_0").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_bundled_model_as_q8_0(tmp_path: Path) -> None:
    """It loads, reads text as before, knows Paris, and has torch's perplexity."""
    model = load("bundled")
    gguf.check(model)
    packed, outer = pack(model, "q8_0")
    path = gguf.write(tmp_path / "model.gguf", model, packed, outer, "q8_0")
    assert path.stat().st_size < 1.1 * gguf.weight_bytes(path)
    assert model.gguf is not None
    source, copy = read_header(model.gguf).fields, read_header(path).fields
    kept = [key for key in source if key.startswith(("tokenizer.", "general.license"))]
    assert len(kept) > 10
    assert {key: copy[key] for key in kept} == {key: source[key] for key in kept}
    prose = TEXTS[-1].read_text(encoding="utf-8")
    ids = model.tokenizer(prose, verbose=False).input_ids
    assert llama_tokens(path, [prose]) == [ids]
    piece = torch.tensor(ids[:256])
    with opened(path) as llama:
        llama.eval(piece.tolist())
        found = torch.from_numpy(np.asarray(llama.scores[: len(piece)]).copy())
        answer = llama("The capital of France is", max_tokens=8, temperature=0)
    assert "Paris" in answer["choices"][0]["text"]
    perplexities = [
        float(torch.nn.functional.cross_entropy(logits[:-1], piece[1:]).exp())
        for logits in (found, torch_logits(model, piece))
    ]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.01)
    assert perplexities[1] < 60
