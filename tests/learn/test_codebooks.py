"""NF4 over a slice, against the published values and a search through all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quantlab.learn import codebooks, material

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""bitsandbytes, `create_normal_map` and csrc/kernels.cu (QLoRA, appendix E)."""


def test_the_codebook_is_the_published_one() -> None:
    np.testing.assert_allclose(codebooks.values_of("nf4").numpy(), NF4, atol=2e-7)
    np.testing.assert_allclose(codebooks.values_of("int4").numpy(), [k / 7 for k in range(-7, 8)])
    assert codebooks.values_of("fp4").numel() == 15  # +0 and -0 are one value


@pytest.mark.parametrize("size", [32, 64, 256])
def test_errors_and_shares(size: int) -> None:
    one = material.load()
    found = codebooks.coded(one, "nf4", size)
    w = one.weight.double().numpy().reshape(-1, size)
    scaled = w / np.abs(w).max(1, keepdims=True)
    for name in codebooks.NAMES:
        values = codebooks.values_of(name).double().numpy()
        nearest = np.abs(scaled[..., None] - values).argmin(-1)
        back = values[nearest] * np.abs(w).max(1, keepdims=True)
        expected = math.sqrt(np.square(back - w).mean() / np.square(w).mean())
        assert found.rms[name] == pytest.approx(expected, rel=1e-4)
        if name == "nf4":
            shares = np.bincount(nearest.reshape(-1), minlength=16) / nearest.size
            np.testing.assert_allclose(found.shares, shares, atol=1e-3)
    assert found.rms["nf4"] < found.rms["int4"] < found.rms["fp4"]
    np.testing.assert_allclose(found.normalized.numpy(), scaled.reshape(-1), atol=1e-6)


def test_double_quantization_saves_bits_and_hardly_moves_scales() -> None:
    one = material.load()
    found = codebooks.doubled(one, 64)
    w = one.weight.reshape(-1, 64)
    np.testing.assert_array_equal(found.absmax.numpy(), w.abs().amax(1).numpy())
    blocks = len(w)
    assert found.bits[0] == 4 + 32 / 64
    nested = math.ceil(blocks / 256)
    assert found.bits[1] == pytest.approx(4 + 8 / 64 + 32 * (nested + 1) / w.numel())
    assert found.mean == pytest.approx(float(found.absmax.mean()))
    # The 8-bit type's coarsest steps are 1/64 of [0.1, 1]: half of one, of the largest deviation.
    bound = float((found.absmax - found.mean).abs().max()) * 0.9 / 64 / 2
    assert float((found.restored - found.absmax).abs().max()) <= bound * 1.01
    assert found.rms[1] == pytest.approx(found.rms[0], rel=0.01)
