"""Packed embedding and head: their rounding, their size, tied and untied, on disk and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlab.engine import generate
from quantlab.errors import ConfigError, MethodError
from quantlab.export import quantlab_format
from quantlab.ggml import quantize_rows
from quantlab.layers import QuantEmbedding, QuantLinear
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.methods.base import WeightConfig
from quantlab.models import locate
from quantlab.outer import check_outer, pack_outer, round_outer
from quantlab.packing import GGMLWeight
from quantlab.types import RunSpec, VariantSpec, ignore
from quantlab.variants import open_runner, prepare_variant
from tests.tiny import VOCABULARY, logits, random, saved, tiny, token_ids

WIDTH = 64


def settings(embedding: int, head: int, method: str = "rtn") -> Any:
    return configure(parse_variant(f"{method}:embedding_bits={embedding}:head_bits={head}"), 32)


def test_every_method_that_packs_weights_has_the_options() -> None:
    without = {
        name
        for name, method in METHODS.items()
        if method.packs and not issubclass(method.Config, WeightConfig)
    }
    own_types = {"gguf", "onnx_int8"}
    assert without == own_types, "derive its Config from base.WeightConfig"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rounding_is_what_the_page_says(bits: int) -> None:
    """8 bits: absmax a row; fewer: zero-point in groups. Slow reference, row by row."""
    weight = random(40, 80, seed=3)
    packed = round_outer(weight, bits, 32)
    group = 80 if bits == 8 else 32
    assert (packed.symmetric, packed.group_size) == (bits == 8, group)
    dense = packed.dequantize()
    for row in range(0, 40, 7):
        for first in range(0, 80, group):
            part = weight[row, first : first + group].double()
            if bits == 8:
                step = float(torch.tensor(float(part.abs().max()) / 127).half())
                wanted = torch.round(part / step).clamp(-128, 127) * step
            else:
                low, high = min(float(part.min()), 0), max(float(part.max()), 0)
                step = float(torch.tensor((high - low) / (2**bits - 1)).half())
                wanted = part
                # Every value is within half a step, or beyond the end that float16 cut off.
                error = (dense[row, first : first + group].double() - part).abs()
                assert float(error.max()) <= step * (0.5 + 2**bits * 2**-11) + 1e-6
                continue
            # A product of float32 numbers may fall on the other side of a tie.
            error = (dense[row, first : first + group].double() - wanted).abs()
            assert float((error > 1e-6).double().mean()) < 0.02


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_lookup_equals_the_dequantized_rows(bits: int) -> None:
    packed = round_outer(random(50, 80), bits, 32)
    layer = QuantEmbedding(packed, torch.float32)
    ids = torch.tensor([[0, 49, 7], [7, 7, 31]])
    assert torch.equal(layer(ids), packed.dequantize()[ids])
    assert layer(ids[:0]).shape == (0, 3, 80)
    assert (layer.num_embeddings, layer.embedding_dim, layer.nbytes) == (50, 80, packed.nbytes)
    assert layer.weight.shape == (50, 80)
    assert bool(layer.weight.isnan().all())
    with pytest.raises(IndexError):
        layer(torch.tensor([50]))


def test_lookup_in_ggml_bytes() -> None:
    packed = GGMLWeight(quantize_rows(random(20, 64), "q8_0"), "q8_0", 64)
    ids = torch.tensor([3, 19, 3])
    assert torch.equal(QuantEmbedding(packed, torch.float32)(ids), packed.dequantize()[ids])


def test_dtype_changes_leave_the_packed_weight() -> None:
    packed = round_outer(random(20, 64), 4, 32)
    layer = QuantEmbedding(packed)
    for moved in (copy.deepcopy(layer), layer.to(torch.float64).half()):
        kept = moved.weight_packed.tensors()
        assert all(torch.equal(kept[name], tensor) for name, tensor in packed.tensors().items())
        assert moved(torch.tensor([1])).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_packed_and_what_it_does(tied: bool) -> None:
    """The model answers like one whose embedding and head were replaced by the rounded ones."""
    model, ids = tiny(tied=tied), token_ids(2, 12)
    packed = pack_outer(model, settings(8, 8))
    assert list(packed) == ["model.embed_tokens"] + ([] if tied else ["lm_head"])
    embedding, head = model.module.get_input_embeddings(), model.module.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert isinstance(head, QuantLinear)
    if tied:
        kept = head.weight_packed.tensors()
        assert all(
            torch.equal(kept[n], t) for n, t in packed["model.embed_tokens"].tensors().items()
        )
    plain = tiny(tied=tied)
    with torch.no_grad():
        plain.module.get_input_embeddings().weight.copy_(packed["model.embed_tokens"].dequantize())
        if not tied:
            plain.module.lm_head.weight.copy_(packed["lm_head"].dequantize())
    wanted = logits(plain.module, ids)
    # The packed head computes in bfloat16: 2^-8 of the sums of |x w|, here of logits around 1.
    torch.testing.assert_close(logits(model.module, ids), wanted, rtol=0.02, atol=0.05)


def test_only_one_of_an_untied_pair() -> None:
    model = tiny()
    assert list(pack_outer(model, settings(16, 4))) == ["lm_head"]
    assert type(model.module.get_input_embeddings()) is nn.Embedding
    assert list(pack_outer(tiny(), settings(4, 16))) == ["model.embed_tokens"]
    assert pack_outer(tiny(), settings(16, 16)) == {}
    assert pack_outer(tiny(), configure(parse_variant("gguf:q8_0"))) == {}


def test_a_tied_pair_set_differently_is_refused() -> None:
    model = tiny(tied=True)
    for embedding, head in ((8, 16), (16, 8), (4, 8)):
        with pytest.raises(ConfigError, match=r"tied\); set both alike, for example both to"):
            check_outer(model, settings(embedding, head))
    assert check_outer(model, settings(4, 4)) == (4, 4)
    assert check_outer(tiny(), settings(4, 8)) == (4, 8)


def test_an_embedding_that_does_more_is_refused() -> None:
    class Scaled(nn.Embedding):
        """As Gemma's, which multiplies by the square root of its width."""

    model = tiny()
    model.module.set_input_embeddings(Scaled(VOCABULARY, WIDTH))
    with pytest.raises(MethodError, match="does more than look up rows; use 16"):
        check_outer(model, settings(8, 16))
    assert check_outer(model, settings(16, 8)) == (16, 8)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = tiny()
    with torch.no_grad():
        model.module.lm_head.weight[3, 4] = float("nan")
    with pytest.raises(MethodError, match="not finite"):
        pack_outer(model, settings(16, 8))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "text", ["rtn:4:embedding_bits=8:head_bits=8", "rtn:4:embedding_bits=4:head_bits=4"]
)
def test_size_counts_every_byte_once_and_it_runs(tmp_path: Path, tied: bool, text: str) -> None:
    """Quantized, saved, loaded and decoded; a tied pair's bytes are in the size and file once."""
    source = locate(str(saved(tmp_path / "model", tied=tied)))
    spec, variant = RunSpec(group_size=32), parse_variant(text)
    prepared = prepare_variant(variant, source, None, tmp_path / "kept", spec, ignore)
    bits = int(dict(variant.options)["embedding_bits"])
    row = 64 + 2 if bits == 8 else 32 + 2 * 2 + 1  # codes, scales, zeros of a row of 64 weights
    outer = VOCABULARY * row * (1 if tied else 2)
    linears = sum(
        rows * (columns // 2 + 2 * (columns // 32) + -(-columns // 32 * 4 // 8))
        for rows, columns in [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    )
    norms = 2 * WIDTH * 2 * 2 + 2 * WIDTH
    assert prepared.size_bytes == outer + 2 * linears + norms
    stored = sum(file.stat().st_size for file in prepared.path.glob("*.safetensors"))
    assert prepared.size_bytes <= stored < prepared.size_bytes + 16_000  # names and shapes
    module = quantlab_format.load(prepared.path)[0].module
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert isinstance(head, QuantLinear)
    shared = torch.equal(embedding.codes, head.weight_packed.tensors()["codes"])
    assert shared is tied
    assert len(generate(module, [5, 9, 30], max_new_tokens=4)) == 4
    if torch.cpu._is_vnni_supported():
        assert head.choice.execution == "packed", "a real kernel runs the head"
    runner = open_runner(variant, prepared, source, None, spec)
    ((_, answer),) = runner.chunks(token_ids(1, 16)[0])
    assert answer.shape == (16, VOCABULARY)
    assert bool(torch.isfinite(answer).all())
    runner.close()


def test_blocks_are_quantized_behind_the_packed_embedding(tmp_path: Path) -> None:
    """GPTQ sees the inputs that the packed embedding gives: other weights than without it."""
    source = locate(str(saved(tmp_path / "model")))
    spec, found = RunSpec(group_size=32), []
    for name, options in (("a", ()), ("b", (("embedding_bits", 2),))):
        variant = VariantSpec("gptq", 4, options)
        prepared = prepare_variant(variant, source, token_ids(4, 24), tmp_path / name, spec, ignore)
        module = quantlab_format.load(prepared.path)[0].module
        found.append(module.model.layers[0].self_attn.q_proj.weight_packed.dequantize())
    assert not torch.equal(*found)
