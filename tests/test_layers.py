"""QuantLinear: its output, its memory, its honesty, and life inside a transformers model."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from kernels import dispatch, reference, torch_int4, torch_outlier, torch_w8a8
from quantlab.ggml import quantize_rows
from quantlab.grid import find_grid, spread, to_codes
from quantlab.layers import QuantLinear, dequantize_rows, kernel_report, replace_linear
from quantlab.methods.llm_int8 import round_rows
from quantlab.packing import (
    Activation,
    AffineWeight,
    GGMLWeight,
    OutlierWeight,
    PackedWeight,
    affine,
    codebook_weight,
    describe,
)

needs_kernels = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="the kernels want an x86 CPU with VNNI"
)


def quantized(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    activation: Activation | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> AffineWeight:
    scale, zero = find_grid(weight, bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    columns = weight.shape[1]
    codes = to_codes(
        weight, spread(scale, group_size, columns), spread(zero, group_size, columns), bits
    )
    return affine(
        codes, scale, None if symmetric else zero, bits, group_size,
        scale_dtype=scale_dtype, activation=activation,
    )  # fmt: skip


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


WEIGHTS: dict[str, Callable[[], PackedWeight]] = {
    "int4": lambda: quantized(random(48, 96), 4, 32),
    "int4 ragged": lambda: quantized(random(48, 96), 4, 64),
    "int4 symmetric": lambda: quantized(random(48, 96), 4, 96, symmetric=True),
    "int3": lambda: quantized(random(48, 96), 3, 32),
    "int8": lambda: quantized(random(48, 96), 8, 96),
    "w8a8 dynamic": lambda: quantized(
        random(48, 96), 8, 96, symmetric=True, activation=Activation("token")
    ),
    "w8a8 static": lambda: quantized(
        random(48, 96), 8, 96, symmetric=True, activation=Activation("tensor", 0.04, 117)
    ),
    "w8a8 dynamic range": lambda: quantized(
        random(48, 96), 8, 96, symmetric=True, activation=Activation("dynamic_tensor")
    ),
    "w8a8 dynamic range per token": lambda: quantized(
        random(48, 96), 8, 96, symmetric=True, activation=Activation("dynamic_token")
    ),
    "w4a8": lambda: quantized(random(48, 96), 4, 32, activation=Activation("token")),
    "w4a8 static": lambda: quantized(
        random(48, 96), 4, 32, activation=Activation("tensor", 0.04, 117)
    ),
    "nf4": lambda: codebook_weight(random(48, 96), "nf4", 64, double_quant=True),
    "fp4": lambda: codebook_weight(random(48, 96), "fp4", 32, double_quant=False),
    # Of 96 normal numbers in a row, one in twenty reaches 2.
    "llm_int8": lambda: round_rows(random(48, 96), 2.0),
    "llm_int8 without": lambda: round_rows(random(48, 96), 0.0),
    "w4a8 dynamic range": lambda: quantized(
        random(48, 96), 4, 32, activation=Activation("dynamic_token")
    ),
    "q8_0": lambda: GGMLWeight(quantize_rows(random(48, 96), "q8_0"), "q8_0", 96),
    "q4_0": lambda: GGMLWeight(quantize_rows(random(48, 96), "q4_0"), "q4_0", 96),
}
KERNELS = {
    "int4": torch_int4.NAME,
    "int4 ragged": torch_int4.NAME,
    "int4 symmetric": torch_int4.NAME,
    "q4_0": torch_int4.NAME,
    "w8a8 dynamic": torch_w8a8.NAME,
    "w8a8 static": torch_w8a8.NAME,
    "llm_int8": torch_outlier.NAME,
    "llm_int8 without": torch_w8a8.NAME,
    "w8a8 dynamic range": torch_w8a8.NAME,
    "w8a8 dynamic range per token": torch_w8a8.NAME,
}
by_weight = pytest.mark.parametrize("name", WEIGHTS)


def meaning(weight: PackedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer stands for, in float64: dequantize() times the (quantized) input."""
    x = x.double()
    if isinstance(weight, OutlierWeight):
        threshold = weight.threshold or float("inf")
        return reference.outlier_linear(x, weight.codes, weight.scales, bias, threshold)
    activation = weight.activation if isinstance(weight, AffineWeight) else None
    if activation is not None:
        scale = activation.scale if activation.kind == "tensor" else None
        codes, step = reference.quantize_input(x, scale, activation.zero, activation.kind)
        x = codes * step
    y = x @ weight.dequantize().double().T
    return y if bias is None else y + bias.double()


def close(y: Tensor, want: Tensor, size: Tensor) -> bool:
    """Within a few bfloat16 roundings (2**-8) of the sizes summed."""
    return bool(((y.double() - want).abs() <= 2**-8 * (3 * size + 2 * want.abs())).all())


@by_weight
@pytest.mark.parametrize("m", [1, 7, 60])
@pytest.mark.parametrize("with_bias", [False, True])
def test_output_is_what_the_weight_means(name: str, m: int, with_bias: bool) -> None:
    weight = WEIGHTS[name]()
    bias = random(1, 48, 3)[0] if with_bias else None
    layer = QuantLinear(weight, bias)
    x = random(m, 96, 4).to(torch.bfloat16)
    # The largest entry of a row decides its step; keep others off the ties of that grid.
    want = meaning(weight, x, bias)
    size = x.double().abs() @ weight.dequantize().double().abs().T
    size = size + (0 if bias is None else bias.double().abs())
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert close(y, want, size)


@pytest.mark.usefixtures("without_native")
@needs_kernels
@by_weight
def test_it_says_which_kernel_runs_and_why(name: str) -> None:
    layer = QuantLinear(WEIGHTS[name](), None)
    if name in KERNELS:
        assert (layer.choice.kernel, layer.choice.execution) == (KERNELS[name], "packed")
    else:
        assert (layer.choice.kernel, layer.choice.execution) == ("reference", "simulated")
    assert layer.choice.why
    assert layer.choice.kernel in repr(layer)


@by_weight
def test_the_packed_weight_comes_back_bit_for_bit(name: str) -> None:
    weight = WEIGHTS[name]()
    layer = QuantLinear(weight, None)
    again = layer.weight_packed
    assert describe(again) == describe(weight)
    for key, tensor in weight.tensors().items():
        assert torch.equal(again.tensors()[key], tensor)
    assert layer.nbytes == weight.nbytes
    assert layer.bits_per_weight == weight.bits_per_weight


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 150),
    bits=st.integers(2, 8),
    group_size=st.integers(1, 160),
    symmetric=st.booleans(),
    kind=st.sampled_from([None, "token", "tensor", "dynamic_tensor", "dynamic_token"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 999),
)
def test_any_shape_any_grid(
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    kind: str | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Whatever kernel is chosen, it computes what the weight means, and gives the weight back."""
    x = random(3, columns, seed + 1).to(dtype)
    activation = None
    if kind is not None:
        activation = Activation(kind, float(x.abs().max()) / 100, 128)  # type: ignore[arg-type]
    weight = quantized(
        random(rows, columns, seed), bits, group_size, symmetric=symmetric, activation=activation
    )
    layer = QuantLinear(weight, None, dtype=dtype)
    step = 0.0 if activation is None else float(x.abs().max()) / 100
    dense = weight.dequantize().double().abs()
    # A code of the input may fall to the other side of a tie: one step of it, weighted.
    ties = step * dense.amax(1) * (x.numel() and 1)
    off = (layer(x).double() - meaning(weight, x, None)).abs()
    size = x.double().abs() @ dense.T
    _, _, zeros = weight.unpacked()
    grid_size = (2**bits * weight.scales.double().amax(1)).expand(rows)
    shift = x.double().abs().sum(1, keepdim=True) * grid_size * 2**-8
    assert bool((off <= 2**-8 * 4 * size + shift + ties + 1e-6).all())
    assert torch.equal(layer.weight_packed.dequantize(), weight.dequantize())
    assert zeros.shape == weight.scales.shape


@by_weight
def test_leading_shapes_and_dtypes(name: str) -> None:
    layer = QuantLinear(WEIGHTS[name](), None)
    x = random(6, 96, 1).to(torch.bfloat16)
    y = layer(x)
    assert torch.equal(layer(x.view(2, 3, 96)), y.view(2, 3, 48))
    assert layer(x[0]).shape == (48,)
    assert layer(x[:0]).shape == (0, 48)
    strided = torch.cat([x, x], 1)[:, ::2]
    assert torch.equal(layer(strided), layer(strided.contiguous()))
    for dtype in (torch.float32, torch.float16, torch.float64):
        other = layer(x.to(dtype))
        assert other.dtype == dtype
        assert torch.equal(other.to(torch.bfloat16), y)
    with pytest.raises(ValueError, match="input has 48 features, this layer 96"):
        layer(x.view(12, 48))


@by_weight
def test_nothing_dense_stays(name: str) -> None:
    """After a call every tensor reachable from the layer is packed data, far below bfloat16.

    A kernel's layout may add to the plain bytes: bfloat16 scales and shifts beside the float16
    ones, and rows padded to a block of 64 (48 here)."""
    weight = WEIGHTS[name]()
    layer = QuantLinear(weight, None)
    layer(random(60, 96))
    assert weight_bytes(layer) <= 2 * weight.nbytes
    if name in ("int4", "int4 ragged"):
        big = quantized(random(192, 576), 4, 64)
        assert weight_bytes(QuantLinear(big, None)) < 0.31 * 2 * 192 * 576


def weight_bytes(layer: QuantLinear) -> int:
    """Bytes of all tensors found by walking the object, each storage once."""
    seen: dict[int, int] = {}

    def walk(value: object, depth: int) -> None:
        if isinstance(value, Tensor):
            key = id(value) if value.layout != torch.strided else value.data_ptr()
            seen[key] = max(seen.get(key, 0), value.nbytes)
        elif isinstance(value, dict):
            for entry in value.values():
                walk(entry, depth + 1)
        elif depth < 4 and hasattr(value, "__dict__") and not isinstance(value, type):
            walk(vars(value), depth + 1)

    walk(vars(layer), 0)
    return sum(seen.values())


@by_weight
def test_buffers_are_what_it_keeps(name: str) -> None:
    layer = QuantLinear(WEIGHTS[name](), random(1, 48)[0])
    assert not list(layer.parameters())
    assert sum(tensor.nbytes for tensor in layer.buffers()) >= weight_bytes(layer)
    # Files keep the packed weight by `weight_packed`; a state dict has what is left, the bias.
    assert list(layer.state_dict()) == ["bias"]


@by_weight
def test_copies_and_pickles_are_whole(name: str) -> None:
    layer = QuantLinear(WEIGHTS[name](), random(1, 48)[0])
    x = random(5, 96, 9)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again is not layer
        assert again.choice == layer.choice
        assert torch.equal(again(x), layer(x))


@by_weight
def test_dtype_changes_of_the_model_leave_it_alone(name: str) -> None:
    weight = WEIGHTS[name]()
    layer = QuantLinear(weight, random(1, 48)[0])
    x = random(5, 96, 9)
    before = layer(x)
    moved = layer.to(torch.float32).half().to("cpu")
    assert torch.equal(moved(x), before)
    assert torch.equal(moved.weight_packed.dequantize(), weight.dequantize())


@by_weight
def test_moving_to_another_device_chooses_again(name: str) -> None:
    """'meta' stands for a device that no kernel here knows."""
    layer = QuantLinear(WEIGHTS[name](), random(1, 48)[0])
    layer.to("meta")
    assert layer.choice.execution == "simulated"
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}
    assert layer.weight.device.type == "meta"


def test_weight_answers_questions_but_is_no_number() -> None:
    layer = QuantLinear(WEIGHTS["int4"](), None)
    assert layer.weight.shape == (48, 96)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.device.type == "cpu"
    assert bool(layer.weight.isnan().all())
    assert layer.weight.untyped_storage().nbytes() <= 8


@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_dequantize_alone(name: str) -> None:
    weight = WEIGHTS[name]()
    assert torch.equal(dequantize_rows(weight, 5, 21), weight.dequantize()[5:21])


def test_rows_of_a_grid_a_tensor() -> None:
    codes = torch.randint(0, 8, (9, 10), dtype=torch.uint8)
    weight = affine(codes, torch.tensor([[0.5]]), torch.tensor([[3.0]]), 3, 10)
    assert torch.equal(dequantize_rows(weight, 2, 5), weight.dequantize()[2:5])


@pytest.mark.usefixtures("without_native")
def test_simulated_tiles_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a tile of a simulated weight exists at a time."""
    rows: list[int] = []
    original = AffineWeight.dequantize

    def watched(self: AffineWeight) -> Tensor:
        rows.append(self.shape[0])
        return original(self)

    layer = QuantLinear(WEIGHTS["int3"](), None)
    want = layer(random(2, 96))
    monkeypatch.setattr(AffineWeight, "dequantize", watched)
    monkeypatch.setattr(reference.tiled_linear, "__defaults__", (96 * 10,))
    got = layer(random(2, 96))
    assert rows == [10, 10, 10, 10, 8]
    assert torch.equal(got, want)


def test_the_threshold_reaches_the_kernel() -> None:
    """Beside 3,000 in one step of 24, the other numbers of the row would all be 0."""
    weight, x = round_rows(random(48, 96), 6.0), random(9, 96, 4)
    x[2, 7] = 3000.0
    off = (QuantLinear(weight, None, dtype=torch.float32)(x) - meaning(weight, x, None)).abs()
    assert float(off.max()) < 0.02
    plain = dataclasses.replace(weight, threshold=0.0)
    off = (QuantLinear(plain, None, dtype=torch.float32)(x) - meaning(weight, x, None)).abs()
    assert float(off.max()) > 10


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 2.0, 50.0])
def test_outlier_columns_without_a_kernel(
    threshold: float, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", ())
    weight, bias = round_rows(random(48, 96), threshold), random(1, 48, 3)[0] if with_bias else None
    layer = QuantLinear(weight, bias)
    assert layer.choice.execution == "simulated"
    x = random(9, 96, 4).to(torch.bfloat16)
    size = x.double().abs() @ weight.dequantize().double().abs().T
    size = size + (0 if bias is None else bias.double().abs())
    assert close(layer(x), meaning(weight, x, bias), size)


# --- inside a model ----------------------------------------------------------------------------


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


def quantize_model(
    model: nn.Module, pack: Callable[[Tensor], PackedWeight], *, dense: bool = False
) -> nn.Module:
    """Every block linear packed; with `dense`, its dequantized weight in place instead."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "layers" in name:
            packed = pack(linear.weight.detach())
            if dense:
                linear.weight.data = packed.dequantize()
            else:
                replace_linear(model, name, QuantLinear(packed, linear.bias))
    return model


@pytest.mark.parametrize(
    "pack",
    [
        lambda w: quantized(w, 4, 32),
        lambda w: quantized(w, 3, 64),
        lambda w: quantized(w, 8, w.shape[1], symmetric=True),
        lambda w: GGMLWeight(quantize_rows(w, "q8_0"), "q8_0", w.shape[1]),
        lambda w: codebook_weight(w, "nf4", 64, double_quant=True),
    ],
    ids=["int4", "int3", "int8", "q8_0", "nf4"],
)
@pytest.mark.parametrize("length", [1, 70])
def test_logits_of_a_model(pack: Callable[[Tensor], PackedWeight], length: int) -> None:
    """Close to the float32 model with the dequantized weights: what bfloat16 inside the linears
    costs, far less than quantizing itself changes."""
    ids = torch.randint(0, 97, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        original = tiny_llama()(ids).logits
        packed = quantize_model(tiny_llama(), pack)(ids).logits
        dense = quantize_model(tiny_llama(), pack, dense=True)(ids).logits
    error = ((packed - dense).norm() / dense.norm()).item()
    assert error < 0.02
    assert not torch.equal(dense, original)


@pytest.mark.usefixtures("without_native")
@needs_kernels
def test_kernel_report() -> None:
    model = tiny_llama()
    assert kernel_report(model) == ("torch matmul (float32)", "packed", ())
    quantize_model(model, lambda w: quantized(w, 4, 32))
    assert kernel_report(model) == (torch_int4.NAME, "packed", ())
    block = model.model.layers[1].mlp
    replace_linear(block, "up_proj", QuantLinear(quantized(random(96, 64), 3, 32), None))
    replace_linear(block, "gate_proj", QuantLinear(quantized(random(96, 64), 3, 32), None))
    names, execution, fallbacks = kernel_report(model)
    assert names == f"{torch_int4.NAME} + reference"
    assert execution == "simulated"
    assert len(fallbacks) == 1
    assert fallbacks[0].startswith("2 of 14 layers by reference")
    assert "no 3-bit codes" in fallbacks[0]


def test_replace_linear() -> None:
    model = tiny_llama()
    layer = QuantLinear(quantized(random(64, 64), 4, 32), None)
    replace_linear(model, "model.layers.0.self_attn.o_proj", layer)
    assert model.model.layers[0].self_attn.o_proj is layer
    replace_linear(model.model.layers[1].self_attn, "o_proj", layer)
    assert model.model.layers[1].self_attn.o_proj is layer
    with pytest.raises(AttributeError):
        replace_linear(model, "model.layers.0.self_attn.no_proj", layer)
