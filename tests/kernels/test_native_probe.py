"""The probes run, and a pass over many matrices is their products one after the other."""

from __future__ import annotations

import sys

import pytest
import torch

from kernels import build, native, native_probe


@pytest.fixture(autouse=True)
def compiled() -> None:
    try:
        build.library(build.chosen())
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", [native_probe.INT8, native_probe.BF16])
def test_peak_is_a_positive_number(kind: int) -> None:
    assert 0 < native_probe.peak(kind) < float("inf")


def test_bandwidth_reads_whole_megabytes() -> None:
    data = torch.ones(3 * 2**20 + 5, dtype=torch.uint8)
    assert 0 < native_probe.read_bandwidth(data) < float("inf")


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("mode", [native.EXACT, native.INT8_BLOCK])
def test_a_pass_ends_with_the_last_product(rows: int, mode: int) -> None:
    """Bit for bit what the layer alone gives; a narrower matrix reads the start of the memory."""
    matrices = [
        native_probe.random_matrix(48, 128, 4, 32),
        native_probe.random_matrix(16, 64, 3, 64),
    ]
    x, y = torch.randn(rows, 128), torch.full((rows, 48), 7.0)
    native_probe.multiply_each(matrices, x, y, native.How(mode))
    narrow = x.view(-1)[: rows * 64].view(rows, 64)
    expected = matrices[1].linear(narrow, native.How(mode))
    assert torch.equal(y.view(-1)[: rows * 16].view(rows, 16), expected)
    with pytest.raises(ValueError, match="too narrow"):
        native_probe.multiply_each(matrices, x[:, :64].contiguous(), y, native.How(mode))


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 64), (8, 96), (16, 96)])
def test_a_copy_is_the_same_weight_elsewhere(bits: int, group: int) -> None:
    matrix = native_probe.random_matrix(40, 96, bits, group)
    copy = native_probe.copy_of(matrix)
    x = torch.randn(3, 96)
    how = native.How(native.EXACT)
    assert torch.equal(copy.linear(x, how), matrix.linear(x, how))
    assert copy.record.codes != matrix.record.codes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are asked for on Linux")
def test_a_large_copy_lies_on_pages_of_its_own() -> None:
    """As packed weights do: on small pages a benchmark of copies reads a quarter slower."""
    matrix = native_probe.random_matrix(1600, 1536, 8, 64)
    copy = native_probe.copy_of(matrix)
    assert torch.equal(copy.tensors["codes"], matrix.tensors["codes"])
    assert copy.record.codes % native.HUGE_PAGE == 0
