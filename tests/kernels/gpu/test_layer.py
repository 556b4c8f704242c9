"""From the declared abilities to a QuantLinear: what `device=cuda` does, as far as a CPU can tell.

The GPU kernels stand in for those of the CPU here, in Triton's interpreter. The last test is for
machines with a GPU.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator

import pytest
import torch

from kernels import dispatch, gpu, reference
from kernels.base import Problem
from quantlab.layers import QuantLinear
from quantlab.packing import Activation, AffineWeight, affine

W4A16 = Problem(64, 128, 4, 64, False, None, "cuda", torch.bfloat16)
W8A8 = Problem(64, 128, 8, 128, True, "token", "cuda", torch.bfloat16)


@pytest.fixture(autouse=True)
def _fresh_probes() -> Iterator[None]:
    dispatch.probe.cache_clear()
    yield
    dispatch.probe.cache_clear()


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (dataclasses.replace(W4A16, dtype=torch.float32), "no float32 activations"),
        (dataclasses.replace(W4A16, group_size=48), "group size 48 is no multiple of 32"),
        (dataclasses.replace(W8A8, activation="outlier"), "not by outlier"),
        (dataclasses.replace(W8A8, bits=4), "no 4-bit codes"),
        (dataclasses.replace(W8A8, symmetric=False), "no zero-points in weights"),
    ],
)
def test_what_they_cannot_do_they_say(problem: Problem, reason: str) -> None:
    choice, kernel = dispatch.choose(problem)
    assert kernel is None
    assert reason in choice.why


@pytest.mark.parametrize("problem", [W4A16, W8A8])
def test_a_machine_without_triton_says_so(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for op in ("w4a16", "w8a8"):
        monkeypatch.delitem(sys.modules, f"kernels.gpu.{op}", raising=False)
    choice, kernel = dispatch.choose(problem)
    assert kernel is None
    assert choice.execution == "simulated"
    assert "triton" in choice.why


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("problem", [W4A16, W8A8])
def test_a_machine_without_a_gpu_says_so(problem: Problem) -> None:
    pytest.importorskip("triton")
    choice, kernel = dispatch.choose(problem)
    assert kernel is None
    assert "torch finds no CUDA GPU" in choice.why


@pytest.mark.parametrize(("capability", "fits"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_older_gpus_are_refused(
    capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels.gpu.launch import require_gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    if fits:
        require_gpu("cuda")
    else:
        with pytest.raises(RuntimeError, match=r"capability 7.5, 8.0 is needed"):
            require_gpu("cuda")


def weight_of(
    bits: int, group_size: int, symmetric: bool, activation: Activation | None
) -> AffineWeight:
    generator = torch.Generator().manual_seed(bits)
    groups = -(-96 // group_size)
    codes = torch.randint(0, 2**bits, (48, 96), generator=generator)
    scales = torch.rand(48, groups, generator=generator) * 0.02 + 1e-3
    zeros = torch.randint(0, 2**bits, (48, groups), generator=generator)
    return affine(
        codes, scales, None if symmetric else zeros, bits, group_size, activation=activation
    )


WEIGHTS = {
    "int4": (gpu.W4A16, weight_of(4, 32, False, None)),
    "int4 ragged, symmetric": (gpu.W4A16, weight_of(4, 64, True, None)),
    "int3": (gpu.W4A16, weight_of(3, 32, False, None)),
    "int8": (gpu.W4A16, weight_of(8, 96, False, None)),
    "w8a8 per token": (gpu.W8A8, weight_of(8, 96, True, Activation("token"))),
    "w8a8 static": (gpu.W8A8, weight_of(8, 96, True, Activation("tensor", 0.04, 117))),
    "w8a8 dynamic": (gpu.W8A8, weight_of(8, 96, True, Activation("dynamic_tensor"))),
}


@pytest.fixture
def on_the_cpu(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [
        dataclasses.replace(kernel, devices=("cpu",), probe=lambda: None) for kernel in gpu.KERNELS
    ]
    monkeypatch.setattr(dispatch, "KERNELS", tuple(kernels))


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_runs_on_them(name: str, dtype: torch.dtype) -> None:
    """The output is what the weight means, the weight comes back, buffers are all it keeps."""
    kernel, weight = WEIGHTS[name]
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(48, generator=generator)
    layer = QuantLinear(weight, bias, dtype=dtype)
    assert (layer.choice.kernel, layer.choice.execution) == (kernel.name, "packed")
    x = torch.randn(2, 5, 96, generator=generator).to(dtype)
    y = layer(x)
    assert (y.shape, y.dtype) == ((2, 5, 48), dtype)
    inner = x.reshape(10, 96).float()
    if weight.activation is not None:
        a = weight.activation
        scale = a.scale if a.kind == "tensor" else None
        codes, step = reference.quantize_input(inner, scale, a.zero, a.kind)
        inner = codes * step
    dense = weight.dequantize().double()
    want = inner.double() @ dense.T + bias.double()
    # Fewer than 128 roundings to float32 (96 columns), one to 8 or 11 significant bits at the end.
    size = inner.double().abs() @ dense.abs().T + bias.double().abs()
    limit = 2.0**-17 * size + (2.0**-8 if dtype == torch.bfloat16 else 2.0**-11) * want.abs()
    assert bool(((y.reshape(10, 48).double() - want).abs() <= 1.01 * limit + 2.0**-25).all())
    for key, tensor in weight.tensors().items():
        assert torch.equal(layer.weight_packed.tensors()[key], tensor)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    prepared = {name for name in layer._buffers if name.startswith("kernel_")}
    assert "kernel_packed" in prepared
    assert "codes" not in layer._buffers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", WEIGHTS)
def test_on_a_gpu(name: str) -> None:
    """Moved to the GPU, a layer takes these kernels and computes the same; and back again."""
    pytest.importorskip("triton")
    kernel, weight = WEIGHTS[name]
    layer = QuantLinear(weight, None)
    for m in (1, 7, 60, 200):
        layer.to("cpu")
        x = torch.randn(m, 96, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)
        want = layer(x).double()
        layer.to("cuda")
        assert (layer.choice.kernel, layer.choice.execution) == (kernel.name, "packed")
        assert {buffer.device.type for buffer in layer.buffers()} == {"cuda"}
        got = layer(x.cuda())
        assert got.device.type == "cuda"
        # Tensor cores may cut off where float32 rounds; a code of x may fall beside a tie.
        size = x.double().abs() @ weight.dequantize().double().abs().T
        assert bool(((got.cpu().double() - want).abs() <= 2.0**-6 * size).all())
        for key, tensor in weight.tensors().items():
            assert torch.equal(layer.weight_packed.tensors()[key].cpu(), tensor)
