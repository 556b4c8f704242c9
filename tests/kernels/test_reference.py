"""The reference ops against arithmetic written out by hand or in loops."""

from __future__ import annotations

import pytest
import torch

from kernels import reference


def test_affine_linear_by_hand() -> None:
    codes = torch.tensor([[0, 1, 15], [8, 7, 2]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 2.0], [1.0, 4.0]])
    zeros = torch.tensor([[8.0, 3.0], [8.0, 0.0]])
    # weights, group size 2: [[-4, -3.5, 24], [0, -1, 8]]
    x = torch.tensor([[1.0, 2.0, 3.0]])
    y = reference.affine_linear(x, codes, scales, zeros, 2, torch.tensor([0.25, -1.0]))
    assert y.tolist() == [[-4 - 7 + 72 + 0.25, -2 + 24 - 1.0]]


def test_one_row_of_grids_serves_every_row() -> None:
    codes = torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8)
    weight = reference.dequantize(codes, torch.tensor([[2.0]]), torch.tensor([[1.0]]), 2)
    assert weight.tolist() == [[-2.0, 0.0], [2.0, 4.0]]


def test_quantize_tensor_by_hand() -> None:
    x = torch.tensor([-100.0, -1.0, 0.0, 0.24, 0.26, 100.0])
    assert reference.quantize_tensor(x, 0.5, 10).tolist() == [0, 8, 10, 10, 11, 210]
    assert reference.quantize_tensor(x, 0.1, 3).tolist() == [0, 0, 3, 5, 6, 255]


def test_quantize_rows_hits_the_largest_magnitude() -> None:
    codes, steps = reference.quantize_rows(torch.tensor([[1.0, -254.0], [0.0, 0.0], [-1.0, 0.5]]))
    # 0.5 / (1 / 127) = 63.5 rounds to the even 64
    assert codes.tolist() == [[0, -127], [0, 0], [-127, 64]]
    assert steps.squeeze(1).tolist() == pytest.approx([2.0, 0.0, 1 / 127])


@pytest.mark.parametrize("input_scale", [None, 0.25])
@pytest.mark.parametrize("group_size", [3, 7])
def test_w8a8_linear_is_integer_arithmetic(input_scale: float | None, group_size: int) -> None:
    """Against python's own whole numbers, group by group."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, generator=generator) * 9
    codes = torch.randint(0, 256, (3, 7), generator=generator, dtype=torch.uint8)
    groups = -(-7 // group_size)
    scales = torch.rand(3, groups, generator=generator)
    zeros = torch.randint(0, 256, (3, groups), generator=generator).float()
    bias = torch.randn(3, generator=generator)
    y = reference.w8a8_linear(x, codes, scales, zeros, group_size, bias, input_scale, 100)
    for m in range(2):
        if input_scale is None:
            step = float(x[m].abs().max()) / 127
            ints = [round(float(v) / step) for v in x[m]]
        else:
            step = input_scale
            ints = [min(max(round(float(v) / step) + 100, 0), 255) - 100 for v in x[m]]
        for n in range(3):
            want = float(bias[n])
            for g in range(groups):
                inside = range(g * group_size, min((g + 1) * group_size, 7))
                total = sum(ints[k] * (int(codes[n, k]) - int(zeros[n, g])) for k in inside)
                want += step * float(scales[n, g]) * total
            assert float(y[m, n]) == pytest.approx(want, rel=1e-6)


def test_outliers_are_split_by_hand() -> None:
    """Column 1 holds a 6: it has no codes, but its 2 still counts for the step of its own row."""
    x = torch.tensor([[1.0, -6.0, 0.25], [0.5, 2.0, 0.0], [0.0, 0.0, 0.0]])
    codes, steps, columns = reference.split_outliers(x, 6.0)
    assert columns.tolist() == [1]
    assert steps.squeeze(1).tolist() == pytest.approx([1 / 127, 2 / 127, 0])
    assert codes.tolist() == [[127, 0, 32], [32, 0, 0], [0, 0, 0]]
    assert reference.split_outliers(x, 6.1)[2].tolist() == []
    assert reference.split_outliers(x, 0.3)[2].tolist() == [0, 1]


@pytest.mark.parametrize("threshold", [0.7, 1.4, 100.0])
def test_outlier_linear_is_two_sums(threshold: float) -> None:
    """Against python's own numbers: whole ones for the codes, real ones for the outliers."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 9, generator=generator)
    codes = torch.randint(-127, 128, (3, 9), generator=generator, dtype=torch.int8)
    scales, bias = torch.rand(3, generator=generator), torch.randn(3, generator=generator)
    y = reference.outlier_linear(x, codes, scales, bias, threshold)
    outliers = [k for k in range(9) if any(abs(float(x[m, k])) >= threshold for m in range(4))]
    assert len(outliers) == {0.7: 8, 1.4: 3, 100.0: 0}[threshold]
    for m in range(4):
        step = max(abs(v) for v in x[m].tolist() if abs(v) < threshold) / 127
        for n in range(3):
            ints = (
                round(float(x[m, k]) / step) * int(codes[n, k]) for k in set(range(9)) - {*outliers}
            )
            real = sum(float(x[m, k]) * int(codes[n, k]) for k in outliers)
            want = float(scales[n]) * (step * sum(ints) + real) + float(bias[n])
            assert float(y[m, n]) == pytest.approx(want, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("tile", [1, 20, 10_000])
def test_tiled_linear_is_the_linear(tile: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(13, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(13, generator=generator)
    seen: list[tuple[int, int]] = []

    def rows(first: int, last: int) -> torch.Tensor:
        seen.append((first, last))
        return weight[first:last]

    y = reference.tiled_linear(x, rows, 13, bias, tile)
    torch.testing.assert_close(y, x @ weight.T + bias.double(), rtol=1e-12, atol=1e-12)
    assert [n for first, last in seen for n in range(first, last)] == list(range(13))
    assert max(last - first for first, last in seen) <= max(1, tile // 5)
