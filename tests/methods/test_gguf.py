"""The GGUF method: which tensor gets which block format, and that their bytes are ggml's."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import pytest
import torch

from quantlab.blockwise import quantize_blocks
from quantlab.calibration import ActStats
from quantlab.errors import ConfigError, MethodError
from quantlab.ggml import FORMATS, quantize_rows
from quantlab.ggml.mixes import FILE_TYPES, tensor_type
from quantlab.methods import METHODS, parse_variant
from quantlab.methods.gguf import GGUFConfig
from quantlab.models import Block
from quantlab.packing import GGMLWeight, PackedWeight
from tests.tiny import GENERIC, block_of, lone_block, random, recorded_inputs, tiny, token_ids

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
    packed = quantized(block_of(tiny(GENERIC)), "q5_0")
    assert {weight.type for weight in packed.values()} == {"q5_0"}
    assert packed.keys() == block_of(tiny(GENERIC)).linears.keys()


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


@pytest.mark.parametrize("type", FILE_TYPES)
def test_importance_reaches_every_format(type: str) -> None:
    """The bytes are those of the format with each linear's own importance, and the mix is the one
    that llama.cpp makes with an importance matrix."""
    block = wide_block(0, 8)
    stats = {
        path: ActStats(9, mean_square=random(256, seed=50 + i).square() ** 2)
        for i, path in enumerate(block.linears)
    }
    packed = GGUF.quantize_block(block, stats, GGUFConfig(type=type, imatrix=True))
    for path, weight in packed.items():
        assert isinstance(weight, GGMLWeight)
        wanted = tensor_type(type, path, 0, 8, 256, 8, gqa=2, tied_head=False, importance=True)
        assert weight.type == wanted
        source = block.linears[path].weight
        assert torch.equal(weight.data, quantize_rows(source, wanted, stats[path].mean_square))


@pytest.mark.parametrize("type", ["q4_0", "iq4_nl", "q3_k_s", "q2_k"])
def test_importance_lowers_the_error_of_the_outputs(type: str) -> None:
    """What the importance matrix is for; inputs as skewed as those of a down-projection."""
    block = wide_block(4, 8)
    x = random(400, 256, seed=3) * torch.exp(1.5 * random(256, seed=4))
    stats = dict.fromkeys(block.linears, ActStats(400, mean_square=x.square().mean(0)))

    def error(packed: Mapping[str, PackedWeight]) -> float:
        differences = [
            packed[path].dequantize() - linear.weight for path, linear in block.linears.items()
        ]
        return sum(float((x @ difference.T).square().sum()) for difference in differences)

    weighed = GGUF.quantize_block(block, stats, GGUFConfig(type=type, imatrix=True))
    plain = GGUF.quantize_block(block, {}, GGUFConfig(type=type))
    assert error(weighed) < 0.8 * error(plain)


def test_calibration_is_asked_for_only_with_an_importance_matrix() -> None:
    assert GGUF.needs_for(GGUFConfig()) == ()
    assert GGUF.needs_for(GGUFConfig(imatrix=True)) == ("square",)
    label = parse_variant("gguf:q4_0:imatrix=true").label
    assert label == "gguf:q4_0:imatrix=true"
    with pytest.raises(ConfigError, match="imatrix=maybe: needs true or false"):
        parse_variant("gguf:q4_0:imatrix=maybe")


def test_importance_is_of_the_unquantized_model() -> None:
    """As llama.cpp's is: the second block's must not know what happened to the first."""
    model, ids = tiny(), token_ids(5, 24)
    with recorded_inputs(model.family, model.module) as seen, torch.no_grad():
        model.module(ids, use_cache=False)
    weights = {path: model.module.get_submodule(path).weight.clone() for path in seen}
    config = GGUFConfig(type="q4_0", imatrix=True)
    packed = quantize_blocks(model, GGUF, config, ids, lambda done, total: None)
    for path, inputs in seen.items():
        squares = torch.cat(inputs).square().mean(0).float()
        weight = packed[path]
        assert isinstance(weight, GGMLWeight)
        wanted = quantize_rows(weights[path], weight.type, squares)
        # Means in float32 and in bfloat16 products: near-ties may fall the other way.
        assert float((weight.data == wanted).float().mean()) > 0.97
        plain = quantize_rows(weights[path], weight.type)
        assert float((weight.data == plain).float().mean()) < 0.9


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
