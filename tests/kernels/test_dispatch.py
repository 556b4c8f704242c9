"""Which kernel is chosen for what, and that every fallback says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from kernels import dispatch, torch_int4, torch_outlier, torch_w8a8
from kernels.base import Kernel, Operands, Prepared, Problem

pytestmark = pytest.mark.usefixtures("without_native")

INT4 = Problem(64, 128, 4, 64, False, None, "cpu", torch.bfloat16)
INT8 = Problem(64, 128, 8, 128, True, "token", "cpu", torch.bfloat16)


needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no VNNI")
needs_avx = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="this CPU has no AVX2"
)


@pytest.fixture(autouse=True)
def _fresh_probes() -> Iterator[None]:
    dispatch.probe.cache_clear()
    yield
    dispatch.probe.cache_clear()


@needs_avx
@pytest.mark.parametrize("group_size", [32, 64, 96, 128])
def test_int4_is_chosen(group_size: int) -> None:
    choice, kernel = dispatch.choose(dataclasses.replace(INT4, group_size=group_size))
    assert kernel is torch_int4.KERNEL
    assert (choice.kernel, choice.execution) == (torch_int4.NAME, "packed")
    assert "4 bits" in choice.why


@needs_vnni
@pytest.mark.parametrize("activation", ["token", "tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_is_chosen(activation: str, dtype: torch.dtype) -> None:
    problem = dataclasses.replace(INT8, activation=activation, dtype=dtype)
    choice, kernel = dispatch.choose(problem)
    assert kernel is torch_w8a8.KERNEL
    assert choice.execution == "packed"


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outlier_columns_are_chosen(dtype: torch.dtype) -> None:
    choice, kernel = dispatch.choose(dataclasses.replace(INT8, activation="outlier", dtype=dtype))
    assert kernel is torch_outlier.KERNEL
    assert choice.execution == "packed"
    assert "outlier columns" in choice.why


@pytest.mark.parametrize(
    ("problem", "reasons"),
    [
        (dataclasses.replace(INT4, bits=3), ["no 3-bit codes", "takes 8-bit inputs only"]),
        (dataclasses.replace(INT4, bits=None), ["not on uniform grids"]),
        (dataclasses.replace(INT4, dtype=torch.float32), ["no float32 activations"]),
        (dataclasses.replace(INT4, device="meta"), ["no kernel for device meta"]),
        (dataclasses.replace(INT4, group_size=48), ["group size 48 is no multiple of 32"]),
        (dataclasses.replace(INT8, group_size=64), ["no groups within a row (group size 64)"]),
        (dataclasses.replace(INT8, symmetric=False), ["no zero-points in weights"]),
        (
            dataclasses.replace(INT8, activation="outlier", device="cuda"),
            ["takes no 8-bit inputs", "takes 8-bit inputs by token or tensor or", "not by outlier"],
        ),
        (dataclasses.replace(INT8, bits=4), ["takes no 8-bit inputs", "no 4-bit codes"]),
        (
            dataclasses.replace(INT8, activation=None, symmetric=False),
            ["no zero-points in weights"],
        ),
        (dataclasses.replace(INT8, dtype=torch.float16), ["no float16 activations"]),
    ],
)
def test_everything_else_is_simulated_and_says_why(problem: Problem, reasons: list[str]) -> None:
    choice, kernel = dispatch.choose(problem)
    assert kernel is None
    assert (choice.kernel, choice.execution) == ("reference", "simulated")
    for reason in reasons:
        assert reason in choice.why


def test_kernels_of_other_devices_give_no_reasons() -> None:
    """Here, what a CPU lacks; for a GPU, what the GPU kernels lack."""
    choice, _ = dispatch.choose(dataclasses.replace(INT4, bits=3))
    assert "Triton" not in choice.why
    choice, _ = dispatch.choose(dataclasses.replace(INT4, device="cuda", dtype=torch.float32))
    assert "no float32 activations" in choice.why
    assert "torch int4pack" not in choice.why


def broken(**changes: object) -> Kernel:
    return dataclasses.replace(torch_int4.KERNEL, **changes)


def test_a_failing_probe_is_recorded_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def probe() -> None:
        asked.append(1)
        raise AttributeError("no such op\nlong trace")

    monkeypatch.setattr(dispatch, "KERNELS", (broken(probe=probe),))
    for _ in range(3):
        choice, kernel = dispatch.choose(INT4)
        assert kernel is None
        assert "AttributeError: no such op" in choice.why
        assert "trace" not in choice.why
    assert len(asked) == 1


def test_a_failing_preparation_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(problem: Problem, operands: Operands) -> Prepared:
        raise RuntimeError("out of luck")

    kernel = broken(prepare=prepare, probe=lambda: None)
    monkeypatch.setattr(dispatch, "KERNELS", (kernel,))
    zeros = torch.zeros(1, 1)
    choice, prepared = dispatch.prepare(INT4, lambda: Operands(zeros.to(torch.uint8), zeros, zeros))
    assert prepared is None
    assert choice.execution == "simulated"
    assert "out of luck" in choice.why


def test_operands_are_not_unpacked_for_the_reference() -> None:
    def never() -> Operands:
        raise AssertionError("unpacked for nothing")

    choice, prepared = dispatch.prepare(dataclasses.replace(INT4, bits=3), never)
    assert prepared is None
    assert choice.execution == "simulated"


@needs_avx
@needs_vnni
@pytest.mark.parametrize(
    "kernel",
    [kernel for kernel in dispatch.KERNELS if "cpu" in kernel.devices],
    ids=lambda k: k.name,
)
def test_a_wrong_product_fails_the_probe(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that compares nothing would let a saturating or missing op through."""
    layer = kernel.prepare
    assert isinstance(layer, type)
    right = layer.__call__  # type: ignore[operator]
    monkeypatch.setattr(layer, "__call__", lambda self, x: right(self, x) * 1.01)
    with pytest.raises(RuntimeError, match=r"product|multiply"):
        kernel.probe()
