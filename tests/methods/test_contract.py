"""What every method keeps to, whoever wrote it: taken from the register, on every tiny family."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from quantlab.blockwise import quantize_blocks, quantize_outer
from quantlab.calibration import ActStats, BlockRunner
from quantlab.errors import MethodError
from quantlab.layers import QuantLinear
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.methods.base import Config, Quantizer, build_config, option, parse_option
from quantlab.models import Block, LoadedModel
from quantlab.packing import (
    AffineWeight,
    CodebookWeight,
    GGMLWeight,
    OutlierWeight,
    PackedWeight,
)
from quantlab.types import VariantSpec
from tests.tiny import FAMILIES, FEW, block_of, logits, recorded_inputs, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact")

QUANTIZING = [name for name, method in METHODS.items() if method.packs]
PLAIN_SPECS = [
    parse_variant(f"{name}:{bits}" if bits else name)
    for name in QUANTIZING
    for bits in (METHODS[name].bits or (None,))
]
SPECS = PLAIN_SPECS + [
    parse_variant(text)
    for text in (
        "rtn:4:symmetric=true", "rtn:4:granularity=channel", "rtn:8:granularity=tensor",
        "rtn:3:clip=true", "gptq:4:symmetric=true", "gptq:4:act_order=false:static_groups=false",
        "gptq:4:clip=false:act_order=false", "awq:4:symmetric=true", "awq:4:clip=false",
        "smoothquant:8:activations=dynamic", "smoothquant:8:search=false:fold_linears=false",
        "smoothquant:8:search=false:alpha=-1", "dynamic_int8:8:activations=token",
        "dynamic_int8:8:per_channel=false", "static_int8:8:observer=percentile",
        "static_int8:8:observer=mse", "onnx_int8:8:per_channel=true",
        "gguf:q8_0", "gguf:q4_0", "gguf:q6_k", "gguf:q4_0:imatrix=true",
        "nf4:4:block_size=32:double_quant=false", "fp4:4:block_size=4096", "llm_int8:8:threshold=0",
        "mixed:arithmetic=awq", "mixed:arithmetic=rtn:preset=all-4",
        "mixed:arithmetic=awq:pattern=*=4;*.down_proj=5", "gptq:4:gptaq=always",
        "gptq:4:damping=channel",
    )
]  # fmt: skip
CALIBRATED = [
    parse_variant(text)
    for text in (
        *(name for name in QUANTIZING if METHODS[name].needs),
        "gguf:imatrix=true",
        "gptq:gptaq=always",
    )
]
GROUP = 32
W8A8 = ("smoothquant", "dynamic_int8", "static_int8", "onnx_int8")
IDS = token_ids(4, 24)


def config_of(spec: VariantSpec) -> Any:
    return configure(spec, GROUP)


def statistics(model: LoadedModel, spec: VariantSpec) -> Mapping[str, ActStats]:
    needs = METHODS[spec.method].needs_for(config_of(spec))
    runner = BlockRunner(model, IDS, original="cross_moment" in needs)
    return runner.collect(block_of(model), needs) if needs else {}


def quantize(model: LoadedModel, spec: VariantSpec) -> dict[str, PackedWeight]:
    method = METHODS[spec.method]
    return method.quantize_block(block_of(model), statistics(model, spec), config_of(spec))


def expected_bits(weight: PackedWeight, spec: VariantSpec) -> float:
    """Bits a weight, scales and zeros counted, from the representation's description."""
    rows, columns = weight.shape
    if isinstance(weight, GGMLWeight):
        blocks = {"f16": (1, 2), "q8_0": (32, 34), "q5_0": (32, 22), "q4_0": (32, 18)}
        size, block_bytes = blocks[weight.type]
        return 8 * block_bytes / size
    if isinstance(weight, OutlierWeight):
        return 8 + 32 / columns
    config = config_of(spec)
    if spec.method in W8A8:
        grids = rows if getattr(config, "per_channel", True) else 1
        return (8 * rows * columns + 32 * grids) / (rows * columns)
    if isinstance(weight, CodebookWeight):
        blocks = -(-rows * columns // config.block_size)
        scales = blocks * 8 + -(-blocks // 256) * 32 + 32 if config.double_quant else blocks * 32
        return 4 + scales / (rows * columns)
    assert isinstance(weight, AffineWeight)
    group = min(config.group_size, columns)
    granularity = getattr(config, "granularity", "group")
    group = group if granularity == "group" else columns
    groups, grids = -(-columns // group), 1 if granularity == "tensor" else rows
    bits = rows * -(-columns * weight.bits // 8) * 8 + grids * groups * 16
    if not getattr(config, "symmetric", False):
        bits += grids * -(-groups * weight.bits // 8) * 8
    return bits / (rows * columns)


LARGEST_ERROR = 4.5
"""Relative error of a linear's outputs, in units of 2^-bits: a step is 2^-bits of the range, and
the range of 32 normal numbers about four times their mean size."""


@torch.no_grad()
def output_errors(model: LoadedModel, packed: dict[str, PackedWeight]) -> dict[str, float]:
    """Error of each linear's outputs on the calibration inputs, relative to the outputs, against
    the float weights of the block as the method left them (folds may have rewritten them)."""
    with recorded_inputs(model.family, model.module) as seen:
        model.module(IDS, use_cache=False)
    found = {}
    for path, weight in packed.items():
        x = torch.cat(seen[f"{model.family.blocks}.0.{path}"])
        original = block_of(model).linears[path].weight.double()
        difference = x @ (weight.dequantize().double() - original).T
        found[path] = float(difference.norm() / (x @ original.T).norm())
    return found


# --- quantize_block ----------------------------------------------------------------------------


@functools.cache
def answered(name: str) -> tuple[Tensor, float]:
    """The family's logits in float64, and the largest error of the same in float32."""
    double = tiny(name)
    exact = logits(double.module.double(), IDS)
    return exact, float((logits(tiny(name).module, IDS) - exact).abs().max())


CASES = [(name, spec) for name in FAMILIES for spec in (SPECS if name in FEW else PLAIN_SPECS)]


@pytest.mark.parametrize(("name", "spec"), CASES, ids=lambda value: getattr(value, "label", value))
def test_every_linear_comes_back_packed(name: str, spec: VariantSpec) -> None:
    """Right shapes, finite, of the expected size, and close in what the linear answers; and what
    the method left in the block, folded or not, is the same function. A fold rounds every number
    that it rewrites once more, as any step of float32 does: logits may be off by what float32 makes
    of the original, a few times over."""
    model = tiny(name)
    packed = quantize(model, spec)
    block = block_of(model)
    exact, error = answered(name)
    assert float((logits(model.module, IDS) - exact).abs().max()) < 4 * error
    assert packed.keys() == block.linears.keys()
    for path, weight in packed.items():
        original = block.linears[path].weight
        dense = weight.dequantize()
        assert isinstance(weight, PackedWeight)
        assert weight.shape == tuple(original.shape) == tuple(dense.shape)
        assert dense.dtype == torch.float32
        assert bool(torch.isfinite(dense).all())
        assert weight.bits_per_weight == pytest.approx(expected_bits(weight, spec))
        assert weight.nbytes == sum(tensor.nbytes for tensor in weight.tensors().values())
    for error in output_errors(model, packed).values():
        assert 0 < error < LARGEST_ERROR * 2.0 ** -METHODS[spec.method].weight_bits(config_of(spec))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_the_same_seed_gives_the_same_weights(spec: VariantSpec) -> None:
    first, second = [], []
    for found in (first, second):
        torch.manual_seed(5)
        model = tiny("llama")
        found += [quantize(model, spec), model.module.state_dict()]
    for path, weight in first[0].items():
        for name, tensor in weight.tensors().items():
            assert torch.equal(tensor, second[0][path].tensors()[name])
    assert all(torch.equal(tensor, second[1][name]) for name, tensor in first[1].items())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_float_function_of_the_block_stays(name: str, spec: VariantSpec) -> None:
    model, ids = tiny(name, seed=1), token_ids(2, 20, seed=3)
    before = logits(model.module, ids)
    quantize(model, spec)
    torch.testing.assert_close(logits(model.module, ids), before, rtol=0, atol=2e-3)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_ragged_last_groups(name: str, spec: VariantSpec) -> None:
    """Width 48 and 80 in groups of 32."""
    model = tiny(name, width=48)
    packed = quantize(model, spec)
    for path, linear in block_of(model).linears.items():
        assert packed[path].shape == tuple(linear.weight.shape)
        assert packed[path].bits_per_weight == pytest.approx(expected_bits(packed[path], spec))
    for error in output_errors(model, packed).values():
        assert error < LARGEST_ERROR * 2.0 ** -METHODS[spec.method].weight_bits(config_of(spec))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_dead_channels_and_constant_rows(spec: VariantSpec) -> None:
    model = tiny("llama")
    block = block_of(model)
    block.module.input_layernorm.weight[[0, 9, 33]] = 0  # never fire
    block.linears["self_attn.q_proj"].weight[3] = 0
    block.linears["self_attn.q_proj"].weight[4] = 0.25
    block.linears["self_attn.q_proj"].weight[5] = -0.25
    block.linears["mlp.down_proj"].weight[:, :40] = 0
    block.linears["mlp.up_proj"].weight[7] = 0  # a unit that is always 0
    ids = token_ids(2, 20, seed=3)
    before = logits(model.module, ids)
    packed = quantize(model, spec)
    torch.testing.assert_close(logits(model.module, ids), before, rtol=0, atol=2e-3)
    for weight in packed.values():
        assert bool(torch.isfinite(weight.dequantize()).all())
    assert not bool(packed["self_attn.q_proj"].dequantize()[3].any())
    # GPTQ (also as EfficientQAT's start) may put compensation into a group of zeros, as far as its
    # finest grid goes.
    largest = float(packed["mlp.down_proj"].dequantize()[:, :32].abs().max())
    assert largest <= (0.02 if spec.method in ("gptq", "efficientqat", "mixed") else 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", CALIBRATED, ids=lambda spec: spec.label)
def test_activations_that_are_not_finite_are_refused(spec: VariantSpec, bad: float) -> None:
    model = tiny("llama")
    stats = statistics(model, spec)

    def spoil(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        spoilt = tensor.clone()
        spoilt[..., 3] = bad
        return spoilt

    spoilt = {
        path: ActStats(stat.tokens, *(spoil(getattr(stat, f.name)) for f in FIELDS))
        for path, stat in stats.items()
    }
    with pytest.raises(MethodError, match="not finite"):
        METHODS[spec.method].quantize_block(block_of(model), spoilt, config_of(spec))


FIELDS = [field for field in dataclasses.fields(ActStats) if field.name != "tokens"]


@pytest.mark.parametrize("spec", CALIBRATED, ids=lambda spec: spec.label)
def test_every_statistic_asked_for_is_read(spec: VariantSpec) -> None:
    """Nothing is collected in vain: without any one of its needs, a method cannot work. (That it
    reads nothing else follows from all the other tests, which collect only what it needs.)"""
    model, method = tiny("llama"), METHODS[spec.method]
    kinds = {"range": ("low", "high"), "mean": ("mean_abs",), "square": ("mean_square",)}
    for kind in method.needs_for(config_of(spec)):
        without = {
            path: dataclasses.replace(stat, **dict.fromkeys(kinds.get(kind, (kind,))))
            for path, stat in statistics(model, spec).items()
        }
        with pytest.raises(AssertionError):
            method.quantize_block(block_of(model), without, config_of(spec))


def test_methods_that_need_no_data_get_none() -> None:
    class Empty(Mapping[str, ActStats]):
        def __getitem__(self, path: str) -> ActStats:
            raise AssertionError("no statistics were collected")

        def __iter__(self) -> Any:
            return iter(())

        def __len__(self) -> int:
            return 0

    for name in QUANTIZING:
        config = config_of(parse_variant(name))
        if not METHODS[name].needs_for(config):
            METHODS[name].quantize_block(block_of(tiny()), Empty(), config)


# --- block by block ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", QUANTIZING)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_model_from_end_to_end(name: str, method: str) -> None:
    model, spec = tiny(name), parse_variant(method)
    before, steps = logits(model.module, IDS), []
    packed = quantize_blocks(
        model, METHODS[method], config_of(spec), IDS, lambda *step: steps.append(step)
    )
    assert steps == [(0, 2), (1, 2), (2, 2)]
    wanted = {
        f"{model.family.blocks}.{index}.{path}"
        for index in range(2)
        for path in block_of(tiny(name), index).linears
    }
    assert packed.keys() == wanted
    for path, weight in packed.items():
        layer = model.module.get_submodule(path)
        assert isinstance(layer, QuantLinear)
        assert torch.equal(layer.weight_packed.dequantize(), weight.dequantize())
        source = tiny(name).module.get_submodule(path)
        assert (layer.bias is None) == (source.bias is None)
    after = logits(model.module, IDS)
    assert bool(torch.isfinite(after).all())
    error = float((after - before).norm() / before.norm())
    bits = METHODS[method].weight_bits(config_of(spec))
    if bits == 2:  # only EfficientQAT asks for so few; rounding at the same bits is the measure
        rounded = tiny(name)
        config = config_of(parse_variant("rtn:2"))
        quantize_blocks(rounded, METHODS["rtn"], config, None, lambda *step: None)
        assert error < float((logits(rounded.module, IDS) - before).norm() / before.norm())
    else:
        assert error < (0.6 if bits <= 4 else 0.12)
    assert error > 0


class Recording(Quantizer):
    """Two-bit rounding that keeps the statistics it is given."""

    name = "recording"
    needs = ("mean",)

    def __init__(self) -> None:
        self.seen: list[Mapping[str, ActStats]] = []

    def quantize_block(
        self, block: Block, stats: Mapping[str, ActStats], config: Any
    ) -> dict[str, PackedWeight]:
        self.seen.append(stats)
        return METHODS["rtn"].quantize_block(block, {}, config)


@pytest.mark.parametrize("name", FEW)
def test_later_blocks_see_the_error_of_earlier_ones(name: str) -> None:
    def mean_inputs(model: LoadedModel) -> Tensor:
        with recorded_inputs(model.family, model.module) as seen, torch.no_grad():
            model.module(IDS, use_cache=False)
        path = next(path for path in seen if path.startswith(f"{model.family.blocks}.1."))
        return torch.cat(seen[path]).abs().mean(0)

    method, config = Recording(), configure(parse_variant("rtn:2"), GROUP)
    model = tiny(name)
    packed = quantize_blocks(model, method, config, IDS, lambda done, total: None)
    assert len(method.seen) == 2
    rounded = tiny(name)
    for path, linear in block_of(rounded).linears.items():
        linear.weight.copy_(packed[f"{rounded.family.blocks}.0.{path}"].dequantize())
    first = next(iter(block_of(tiny(name), 1).linears))
    given = method.seen[1][first].mean_abs
    assert given is not None
    # Quantized layers compute in bfloat16.
    near = float((given - mean_inputs(rounded)).norm() / given.norm())
    far = float((given - mean_inputs(tiny(name))).norm() / given.norm())
    assert near < 0.02
    assert far > 5 * near


def test_weights_that_are_not_finite_are_refused() -> None:
    for method, bad in itertools.product(QUANTIZING, (float("nan"), float("inf"))):
        model = tiny("llama")
        block_of(model, 1).linears["mlp.up_proj"].weight[2, 3] = bad
        with pytest.raises(MethodError, match=r"finite"):
            quantize_blocks(
                model, METHODS[method], config_of(parse_variant(method)), IDS, lambda *_: None
            )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_only_gguf_packs_embedding_and_head(method: str, tied: bool) -> None:
    model = tiny(tied=tied)
    outer = quantize_outer(model, METHODS[method], configure(parse_variant(method), GROUP))
    if method != "gguf":
        assert not outer
        return
    assert list(outer) == (["token_embd"] if tied else ["token_embd", "output"])
    embedding = model.module.get_input_embeddings().weight
    assert outer["token_embd"].shape == tuple(embedding.shape)


def test_unquantized_methods_leave_the_model() -> None:
    for name, bits in (("bf16", 16), ("fp32", 32)):
        model, method = tiny(), METHODS[name]
        config = configure(parse_variant(name))
        assert quantize_blocks(model, method, config, None, lambda *_: None) == {}
        assert not [m for m in model.module.modules() if isinstance(m, QuantLinear)]
        assert (method.weight_bits(config), method.activation_bits(config)) == (bits, bits)


def test_a_newcomer_needs_one_class() -> None:
    """The base class serves any frozen Config; nothing is told about the method elsewhere."""

    @dataclasses.dataclass(frozen=True)
    class Own(Config):
        bits: int = option(4, "Bits", "Bits a weight.", minimum=2, maximum=8)
        rate: float = option(0.5, "Rate", "A fraction.", minimum=0, maximum=1, step=0.1)

    class Newcomer(Recording):
        name = "newcomer"
        bits = (4, 3)
        Config = Own

    spec = VariantSpec("newcomer", 3, (("rate", 1),))
    config = build_config(Newcomer(), spec)
    assert (config.bits, config.rate, type(config.rate)) == (3, 1.0, float)
    assert Newcomer().weight_bits(config) == 3
    assert Newcomer().quantize_outer(torch.ones(2, 2), "output", True, config) is None
    assert parse_option(dataclasses.fields(Own)[1], "0.25") == 0.25
