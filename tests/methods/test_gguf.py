"""The GGUF method: which tensor gets which block format, and that their bytes are ggml's."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from quantlab.errors import ConfigError, MethodError
from quantlab.ggml import FORMATS, quantize_rows
from quantlab.ggml.mixes import FILE_TYPES
from quantlab.methods import METHODS, parse_variant
from quantlab.methods.gguf import GGUFConfig
from quantlab.models import Block
from quantlab.packing import GGMLWeight
from tests.tiny import block_of, lone_block, random, tiny

GGUF = METHODS["gguf"]


def quantized(block: Block, type: str) -> dict[str, GGMLWeight]:
    packed = GGUF.quantize_block(block, {}, GGUFConfig(type=type))
    assert all(isinstance(weight, GGMLWeight) for weight in packed.values())
    return packed  # type: ignore[return-value]


def wide_block(index: int, count: int) -> Block:
    """Every kind of matrix, 256 wide so that super-blocks fit; two query heads a key head."""
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    block = lone_block({kind: random(8, 256, seed=i) for i, kind in enumerate(kinds)})
    kinds_of = {kind: kind for kind in kinds}
    return dataclasses.replace(
        block, index=index, count=count, kinds=kinds_of, heads=4, kv_heads=2, head_dim=4
    )


@pytest.mark.parametrize("type", FILE_TYPES)
def test_bytes_are_those_of_the_block_format(type: str) -> None:
    block = wide_block(1, 8)
    for path, weight in quantized(block, type).items():
        assert weight.type in FORMATS
        assert torch.equal(weight.data, quantize_rows(block.linears[path].weight, weight.type))
        assert weight.shape == (8, 256)
        assert weight.bits_per_weight == 8 * weight.data.numel() / (8 * 256)
        if path in ("ffn_gate", "ffn_up"):
            assert weight.type == FILE_TYPES[type].base, "no mix singles these out"


@pytest.mark.parametrize(
    ("index", "better"), [(0, True), (1, False), (2, False), (3, True), (4, False), (7, True)]
)
def test_q4_k_m_spends_more_on_half_of_the_blocks(index: int, better: bool) -> None:
    """First and last eighth, and every third between: llama.cpp's rule for 8 blocks."""
    types = {
        path: weight.type for path, weight in quantized(wide_block(index, 8), "q4_k_m").items()
    }
    wanted = "q6_k" if better else "q4_k"
    assert types["attn_v"] == types["ffn_down"] == wanted
    assert {types[k] for k in ("attn_q", "attn_k", "attn_output", "ffn_gate")} == {"q4_k"}


def test_narrow_rows_fall_back() -> None:
    """64 columns hold no super-block of 256, 48 not even a block of 32."""
    assert {w.type for w in quantized(block_of(tiny()), "q6_k").values()} == {"q8_0"}
    mixed = quantized(block_of(tiny()), "q4_k_s")
    assert mixed["self_attn.v_proj"].type == "q5_1", "q5_k was wanted for the first attn_v"
    assert mixed["mlp.up_proj"].type == "q5_0"
    narrow = quantized(block_of(tiny(width=48)), "q4_0")
    assert narrow["mlp.gate_proj"].type == "f16"
    torch.testing.assert_close(
        narrow["mlp.gate_proj"].dequantize(),
        block_of(tiny(width=48)).linears["mlp.gate_proj"].weight.half().float(),
    )


def test_a_generic_family_gets_the_base_format_throughout() -> None:
    packed = quantized(block_of(tiny("neox")), "q5_0")
    assert {weight.type for weight in packed.values()} == {"q5_0"}
    assert packed.keys() == block_of(tiny("neox")).linears.keys()


def test_more_bits_lose_less() -> None:
    """Over the file types from most bits to fewest, within a family of formats."""
    for types in (("q8_0", "q5_0", "q4_0"), ("q6_k", "q5_k_s", "q4_k_s", "q3_k_s", "q2_k")):
        errors = []
        for type in types:
            block = wide_block(1, 8)
            weight = quantized(block, type)["ffn_up"].dequantize()
            errors.append(float((weight - block.linears["ffn_up"].weight).square().mean()))
        for more, fewer in itertools.pairwise(errors):
            assert more < fewer / 1.5


def test_embedding_and_head() -> None:
    embedding = random(24, 256)
    for tied, kind, wanted in (
        (False, "token_embd", "q4_k"),
        (True, "token_embd", "q6_k"),
        (False, "output", "q6_k"),
    ):
        packed = GGUF.quantize_outer(embedding, kind, tied, GGUFConfig(type="q4_k_m"))
        assert isinstance(packed, GGMLWeight)
        assert (packed.type, packed.shape) == (wanted, (24, 256))
        assert torch.equal(packed.data, quantize_rows(embedding, wanted))


def test_bits_are_those_of_the_type() -> None:
    for name, bits in (("q4_k_m", 4), ("q8_0", 8), ("q2_k", 2), ("f16", 16)):
        config = GGUFConfig(type=name)
        assert GGUF.weight_bits(config) == bits
        assert GGUF.activation_bits(config) == 16
    assert parse_variant("gguf:Q4_K_M").label == "gguf:q4_k_m"
    assert parse_variant("gguf").label == "gguf"
    for wrong in ("gguf:q9_k", "gguf:4", "gguf:type=q4"):
        with pytest.raises(ConfigError, match=r"type=.*choose one of .*q4_k_m"):
            parse_variant(wrong)


def test_weights_that_are_not_finite_are_refused() -> None:
    block = lone_block({"ffn_up": random(4, 64)})
    block.linears["ffn_up"].weight[1, 2] = float("nan")
    with pytest.raises(MethodError, match="finite"):
        quantized(block, "q4_0")
