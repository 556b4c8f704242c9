"""What must hold for any weights: finite values, error bounds, exact zeros, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from quantlab.errors import ConfigError, MethodError
from quantlab.ggml import FORMATS, dequantize_rows, quantize_rows

BLOCK_FORMATS = [name for name, entry in FORMATS.items() if entry.block_size > 1]
LARGEST_HALF, SMALLEST_HALF = 65504.0, 2.0**-24


def _rows(low: float, high: float) -> st.SearchStrategy[Tensor]:
    """Two rows of 256 float32 values, each block with magnitudes of its own."""
    value = st.floats(low, high, width=32, allow_nan=False, allow_infinity=False)
    return arrays(np.float32, (2, 256), elements=value, fill=st.just(0.0)).map(torch.from_numpy)


ANY = float(np.finfo(np.float32).max)
anything = _rows(-ANY, ANY)
moderate = _rows(-1000.0, 1000.0)


def _round_trip(weight: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    return dequantize_rows(quantize_rows(weight, name, importance), name, weight.shape[1])


@pytest.mark.parametrize("name", list(FORMATS))
@settings(deadline=None, max_examples=60)
@given(weight=anything, seed=st.none() | st.integers(0, 9))
def test_decoded_values_are_finite(name: str, weight: Tensor, seed: int | None) -> None:
    importance = None
    if seed is not None:
        random = np.random.default_rng(seed)
        exponents = random.integers(-30, 30, 256)
        importance = torch.from_numpy(random.integers(0, 3, 256) * 10.0**exponents)
    assert bool(_round_trip(weight, name, importance).isfinite().all())


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("size", [1e-40, 1e-9, 1.0, 1e5, 1e9, 1e20, 3e38])
def test_extreme_magnitudes_stay_finite_and_keep_their_sign(name: str, size: float) -> None:
    weight = torch.linspace(-1, 1, 512).view(2, 256) * size
    decoded = _round_trip(weight, name)
    assert bool(decoded.isfinite().all())
    assert bool((decoded[0, :128] <= 0).all())
    assert bool((decoded[1, 128:] >= 0).all())
    if 1e-6 < size < 1e6:
        assert (decoded[1, -1] / size).item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_too_large_values_saturate_and_leave_the_rest(name: str) -> None:
    """Beyond the reach of the format a value becomes its largest; its neighbours stay right."""
    codes = {"q8_0": 127, "q5_0": 16, "q5_1": 31, "q4_0": 8, "q4_1": 15, "iq4_nl": 113}
    codes |= {"q6_k": 128 * 32, "q5_k": 63 * 31, "q4_k": 63 * 15, "q3_k": 32 * 4, "q2_k": 15 * 3}
    reach = codes[name] * LARGEST_HALF
    weight = torch.full((1, 256), 0.4 * reach)
    weight[0, 5::32] = 4 * reach
    decoded = _round_trip(weight, name)
    others = decoded[weight < reach]
    assert (others / (0.4 * reach) - 1).abs().max().item() < 0.3
    assert decoded[0, 5].item() == pytest.approx(reach, rel=0.2)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("guided", [False, True])
def test_zeros_are_exact(name: str, guided: bool) -> None:
    weight = torch.zeros(3, 512)
    weight[1] = torch.linspace(-1, 1, 512)
    importance = torch.linspace(0, 5, 512) if guided else None
    decoded = _round_trip(weight, name, importance)
    assert not decoded[0].any()
    assert not decoded[2].any()


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("value", [0.37, -0.37, 1.0, -2048.0])
def test_constant_blocks_keep_their_value(name: str, value: float) -> None:
    """One value a block needs no resolution: only the rounding of the float16 factors is left.

    q2_k, q4_k and q5_k store a scale or a minimum rounded twice (d, and its six-bit code), so the
    factor itself is the sharpest bound there; all stay within 1/16 (q6_k's extremes are -32 / 31).
    """
    decoded = _round_trip(torch.full((1, 256), value), name)
    tolerance = 2.0**-10 if FORMATS[name].block_size == 32 else 2.0**-8
    assert (decoded / value - 1).abs().max().item() <= tolerance


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_one_outlier_leaves_other_blocks_alone(name: str) -> None:
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(8)) * 0.02
    spoiled = weight.clone()
    spoiled[1, 300] = 5000.0
    size = FORMATS[name].block_size
    first = 300 // size * size
    difference = _round_trip(spoiled, name) != _round_trip(weight, name)
    difference[1, first : first + size] = False
    assert not difference.any()
    assert _round_trip(spoiled, name)[1, 300].item() == pytest.approx(5000, rel=0.05)


@pytest.mark.parametrize("name", ["q8_0", "q5_0", "q4_0", "f16", "bf16", "f32"])
@settings(deadline=None, max_examples=60)
@given(weight=moderate)
def test_quantizing_again_changes_nothing(name: str, weight: Tensor) -> None:
    once = _round_trip(weight, name)
    assert torch.equal(_round_trip(once, name), once)


@pytest.mark.parametrize("name", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
@settings(deadline=None, max_examples=60)
@given(weight=moderate)
def test_error_is_within_half_a_step(name: str, weight: Tensor) -> None:
    """|x - y| <= step / 2, plus what the float16 factors lose (2^-11 relative, 2^-25 absolute).

    The symmetric formats reach 2^(bits-1) steps on the side of the extreme value and one step less
    on the other, where the error is up to a whole step.
    """
    blocks = weight.view(-1, 32).double()
    decoded = _round_trip(weight, name).view(-1, 32).double()
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    largest = blocks.abs().amax(1, keepdim=True)
    bits = FORMATS[name].bits
    if name == "q8_0":
        step, codes, offset = largest / 127, 127, torch.zeros_like(low)
        bound = step / 2
    elif name.endswith("_1"):
        codes, offset = 2**bits - 1, low.abs()
        step = (high - low) / codes
        bound = step / 2
    else:
        codes, offset = 2 ** (bits - 1), torch.zeros_like(low)
        step = largest / codes
        extreme = torch.where(high >= -low, high, low)
        beyond = (high == -low) | (blocks * extreme.sign() < -(codes - 0.5) * step)
        bound = torch.where(beyond, step, step / 2)
    bound = bound + (codes * step + offset) * 2.0**-11 + (codes + 1) * SMALLEST_HALF / 2
    assert bool(((blocks - decoded).abs() <= bound * (1 + 2.0**-20)).all())


@pytest.mark.parametrize("name", ["q6_k", "q5_k", "q4_k", "q3_k", "q2_k"])
def test_more_bits_less_error(name: str) -> None:
    """Root mean square error of normal weights, relative, near what the width allows."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(9))
    error = (_round_trip(weight, name) - weight).square().mean().sqrt().item()
    limits = {"q6_k": 0.02, "q5_k": 0.04, "q4_k": 0.08, "q3_k": 0.2, "q2_k": 0.4}
    assert limits[name] / 4 < error < limits[name]


@pytest.mark.parametrize("name", ["q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "q4_0", "q4_1"])
def test_importance_lowers_the_error_it_weighs(name: str) -> None:
    generator = torch.Generator().manual_seed(10)
    weight = torch.randn(64, 1024, generator=generator)
    importance = torch.randn(1024, generator=generator).exp() ** 3

    def weighted_error(decoded: Tensor) -> float:
        return float((importance * (decoded - weight) ** 2).sum())

    guided = weighted_error(_round_trip(weight, name, importance))
    assert guided < 0.95 * weighted_error(_round_trip(weight, name))


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_only_the_proportions_of_importance_count(name: str) -> None:
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(8, 512, generator=generator)
    importance = torch.rand(512, generator=generator) + 0.1
    data = quantize_rows(weight, name, importance)
    assert torch.equal(quantize_rows(weight, name, importance * 2.0**20), data)
    assert torch.equal(quantize_rows(weight, name, importance.double() * 2.0**90), data)


def test_columns_without_importance_are_not_lost() -> None:
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(12))
    importance = torch.ones(512)
    importance[64:128] = 0
    for name in BLOCK_FORMATS:
        decoded = _round_trip(weight, name, importance)
        assert (decoded - weight)[:, 64:128].abs().max().item() < 1.2, name
        assert bool((decoded[:, 64:128] != 0).any()), name
        everywhere = _round_trip(weight, name, torch.zeros(512))
        assert torch.equal(everywhere, _round_trip(weight, name, torch.ones(512))), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_strides(dtype: torch.dtype) -> None:
    weight = torch.randn(256, 6, generator=torch.Generator().manual_seed(13)).to(dtype).t()
    expected = quantize_rows(weight.to(torch.float32).contiguous(), "q4_k")
    assert torch.equal(quantize_rows(weight, "q4_k"), expected)


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_input_is_left_alone(name: str) -> None:
    weight = torch.linspace(-1e30, 1e30, 256).view(1, 256)
    importance = torch.linspace(0, 1e30, 256)
    before = weight.clone(), importance.clone()
    quantize_rows(weight, name, importance)
    FORMATS[name].quantize(weight.view(-1, FORMATS[name].block_size), None)
    assert torch.equal(weight, before[0])
    assert torch.equal(importance, before[1])


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        quantize_rows(torch.ones(2, 32), "q4_0")
        assert torch.get_num_threads() == 3
        with pytest.raises(MethodError):
            quantize_rows(torch.full((2, 32), torch.nan), "q4_0")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["q8_0", "q5_0", "q4_k"])
def test_threads_share_the_rows_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three threads write the bytes of one, ragged last chunk included, and a refusal gets out."""
    monkeypatch.setattr("quantlab.ggml._CHUNK_WEIGHTS", 4 * 256)
    weight = torch.randn(4 * 7 + 1, 256, generator=torch.Generator().manual_seed(5))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = quantize_rows(weight, name)
        torch.set_num_threads(3)
        assert torch.equal(quantize_rows(weight, name), expected)
        weight[-1, -1] = torch.inf
        with pytest.raises(MethodError, match="finite"):
            quantize_rows(weight, name)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_refusals_say_what_would_be_right() -> None:
    weight = torch.ones(2, 576)
    with pytest.raises(ConfigError, match="q4_k needs a multiple of 256 columns, not 576"):
        quantize_rows(weight, "q4_k")
    with pytest.raises(ConfigError, match="unknown ggml block format 'q4_k_m'; known: f32, "):
        quantize_rows(weight, "q4_k_m")
    with pytest.raises(ConfigError, match="2 dimensions"):
        quantize_rows(weight[0], "q4_0")
    with pytest.raises(ConfigError, match=r"one value a column \[576\], not \[32\]"):
        quantize_rows(weight, "q4_0", torch.ones(32))
    with pytest.raises(ConfigError, match="finite and not negative"):
        quantize_rows(weight, "q4_0", -torch.ones(576))
    with pytest.raises(MethodError, match="NaN or infinity"):
        quantize_rows(weight / 0, "q4_0")
    with pytest.raises(ConfigError, match=r"uint8 \[rows, 324\], not uint8 \[2, 576\]"):
        dequantize_rows(torch.zeros(2, 576, dtype=torch.uint8), "q4_0", 576)
