"""One outlier on a grid, against loops in plain Python."""

from __future__ import annotations

import math

import pytest

from quantlab.learn import material, outlier


def slow(values: list[float], bits: int, group: int, symmetric: bool) -> list[float]:
    """Round each group on its own grid, one weight after the other."""
    back = []
    for start in range(0, len(values), group):
        part = values[start : start + group]
        if symmetric:
            step, zero = max(map(abs, part)) / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
        else:
            low, high = min(*part, 0.0), max(*part, 0.0)
            step = (high - low) / (2**bits - 1)
            zero = round(-low / step)
        codes = [min(max(round(v / step) + zero, 0), 2**bits - 1) for v in part]
        back += [(code - zero) * step for code in codes]
    return back


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("times", "bits", "group"), [(1, 4, 128), (10, 3, 32), (30, 8, 16)])
def test_rounding_and_errors(times: float, bits: int, group: int, symmetric: bool) -> None:
    row = material.load().weight[0, :128]
    found = outlier.rounded(row, times, bits, group, symmetric)
    values = row.tolist()
    place = max(range(128), key=lambda at: abs(values[at]))
    values[place] *= times
    expected = slow(values, bits, group, symmetric)
    assert found.outlier == place
    # A weight in the middle between two values may fall to either in float32.
    step = max(abs(v) for v in found.scale.tolist())
    differ = [at for at in range(128) if abs(found.rounded[at] - expected[at]) > 1e-5 * step]
    assert len(differ) <= 1
    squares = [(expected[at] - values[at]) ** 2 for at in range(128) if at != place]
    assert found.rms == pytest.approx(math.sqrt(sum(squares) / 127), rel=1e-3)


def test_groups_confine_the_outlier_and_cost_bits() -> None:
    row = material.load().weight[0, :128]
    found = outlier.sweep(row, 20, 4, True)
    assert found.group_sizes == (16, 32, 64, 128)
    assert list(found.rms) == sorted(found.rms)
    assert found.bits_per_weight == (5.0, 4.5, 4.25, 4.125)
    with_zero = outlier.sweep(row, 20, 4, False)
    assert with_zero.bits_per_weight[0] == 4 + 20 / 16


def test_an_outlier_wastes_codes() -> None:
    row = material.load().weight[0, :128]
    used = [outlier.rounded(row, times, 4, 128, True).codes_used for times in (1, 10, 30)]
    assert used[0] > used[1] >= used[2] >= 1


def test_the_largest_channel_of_a_real_input() -> None:
    one = material.load(layer="11.mlp.down_proj")
    found = outlier.channels(one, 8)
    x = one.inputs.tolist()
    peaks = [max(abs(row[c]) for row in x) for c in range(256)]
    top = max(range(256), key=lambda c: peaks[c])
    assert found.top == top
    assert found.peaks.tolist() == peaks
    middle = sorted(peaks)[127]
    assert found.ratio == pytest.approx(peaks[top] / middle)
    step = peaks[top] / 127
    rest = [row[c] for row in x for c in range(256) if c != top]
    error = sum((round(v / step) * step - v) ** 2 for v in rest) / sum(v * v for v in rest)
    assert found.rms_with == pytest.approx(math.sqrt(error), rel=1e-4)
    assert found.rms_without < found.rms_with
