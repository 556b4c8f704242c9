"""ggml's block types as layers of QuantLab: the codes and grids in their bytes, and products by the
native kernels, held to `dequantize_rows`, which other tests hold to llama.cpp's own bytes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from quantlab.errors import ConfigError
from quantlab.ggml import FORMATS, dequantize_rows, layout_of, quantize_rows
from quantlab.layers import QuantEmbedding, QuantLinear
from quantlab.native_weights import matrix_of, native_form
from quantlab.operands import operands_of, problem_of
from quantlab.packing import GGMLWeight

CODED = [name for name, format in FORMATS.items() if format.layout is not None]
PLAIN = [name for name in FORMATS if name not in CODED]
by_type = pytest.mark.parametrize("name", CODED)
GRIDS = {
    "q8_0": ("uniform", 8, 32), "q6_k": ("uniform", 6, 16), "q5_k": ("offset", 5, 32),
    "q5_1": ("offset", 5, 32), "q5_0": ("uniform", 5, 32), "q4_k": ("offset", 4, 32),
    "q4_1": ("offset", 4, 32), "q4_0": ("uniform", 4, 32), "iq4_nl": ("table", 4, 32),
    "q3_k": ("uniform", 3, 16), "q2_k": ("offset", 2, 16),
}  # fmt: skip


def random(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def weight_of(name: str, rows: int = 40, columns: int = 512) -> GGMLWeight:
    return GGMLWeight(quantize_rows(random(rows, columns), name), name, columns)


@by_type
def test_any_bytes_come_back_from_their_codes_and_factors(name: str) -> None:
    """Also bytes that no quantizer would write: the format loses nothing."""
    layout, format = layout_of(name), FORMATS[name]
    shape = (64, format.block_bytes)
    data = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    grids, factors = layout.read(data), layout.factors(data)
    assert grids.codes.dtype == torch.uint8
    assert factors.shape[1] == format.block_bytes - format.block_size * format.bits // 8
    assert torch.equal(layout.join(factors, grids.codes), data)


@by_type
def test_the_grids_are_those_of_the_format(name: str) -> None:
    problem = problem_of(weight_of(name), "cpu", torch.float32)
    assert not isinstance(problem, str)
    assert (problem.grid, problem.bits, problem.group_size) == GRIDS[name]
    operands = operands_of(weight_of(name))
    assert operands.codes.shape == (40, 512)
    assert int(operands.codes.max()) < 2 ** (problem.bits or 0)
    assert operands.scales.shape == operands.zeros.shape == (40, 512 // problem.group_size)


@pytest.mark.parametrize("name", PLAIN)
def test_types_without_codes_have_no_kernel_and_say_so(name: str) -> None:
    weight = weight_of(name)
    assert native_form(weight) == f"no native layout for {name} weights"
    layer = QuantLinear(weight, None)
    assert layer.choice.execution == "simulated"
    assert name in layer.choice.why
    with pytest.raises(ConfigError, match="no codes"):
        layout_of(name)
    with pytest.raises(NotImplementedError, match=name):
        matrix_of(weight)


@by_type
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_weights(name: str, rows: int, dtype: torch.dtype) -> None:
    weight, bias = weight_of(name), random(1, 40, 5)[0]
    layer = QuantLinear(weight, bias, dtype)
    assert (layer.choice.kernel, layer.choice.execution) == ("QuantLab native", "packed")
    x = random(rows, 512, 6).to(dtype)
    values = dequantize_rows(weight.data, name, 512).double()
    want = x.double() @ values.T + bias.double()
    # Exact inputs have 16 bits beside the largest of 32; types with a minimum are a difference of
    # two products, each as large as the minimum makes it.
    size = x.abs().double().amax(1, keepdim=True) * values.abs().sum(1) + 1
    bound = 2**-14 * size + (2**-8 * want.abs() if dtype == torch.bfloat16 else 0)
    assert bool(((layer(x).double() - want).abs() <= bound).all())


@by_type
def test_the_bytes_are_kept_once_and_come_back(name: str) -> None:
    weight = weight_of(name)
    layer = QuantLinear(weight, None)
    assert "data" not in dict(layer.named_buffers())
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        back = one.weight_packed
        assert isinstance(back, GGMLWeight)
        assert (back.type, back.columns) == (name, 512)
        assert torch.equal(back.data, weight.data)
    assert (layer.nbytes, layer.bits_per_weight) == (weight.nbytes, weight.bits_per_weight)
    ids = torch.tensor([3, 0, 39])
    rows = QuantEmbedding(weight, torch.float32)(ids)
    assert torch.equal(rows, weight.dequantize()[ids])
