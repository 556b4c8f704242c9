"""What the launchers start, compiled for an A100 (sm_80) and an H100 (sm_90): no GPU is needed.

The arguments are those of real launches on CPU tensors, specialized as Triton does at run time.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.base import ActivationKind, Operands, Problem
from kernels.gpu.launch import Launch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import compiler  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.gpu import w4a16, w8a8  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled"
)

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may have."""
CORES = {80: "mma.sync", 90: "wgmma.mma_async"}
"""Instructions of the tensor cores."""
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path) -> Iterator[None]:
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield


def compiled(launch: Launch, architecture: int) -> Any:
    """The launch's program for an architecture. As at run time, addresses and numbers that are
    multiples of 16 are known to be, and None and 1 are constants."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.program.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = f"*{TYPES[value.dtype]}" if tensor else "i32"
        if tensor or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(launch.program, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )


def resources(ptx: str, architecture: int, folder: Path) -> tuple[int, int]:
    """(registers a thread, bytes spilled a thread) as Triton's own assembler counts them."""
    source = folder / "program.ptx"
    source.write_text(ptx)
    command = [
        compiler.get_ptxas(architecture).path,
        "-v",
        f"--gpu-name={compiler.sm_arch_from_capability(architecture)}",
        str(source),
        "-o",
        str(folder / "program.cubin"),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.findall(r"Used (\d+) registers", said)
    spilled = re.findall(r"(\d+) bytes (?:spill stores|spill loads|stack frame)", said)
    assert len(registers) == 1
    assert len(spilled) == 3
    return int(registers[0]), sum(map(int, spilled))


def check(launch: Launch, architecture: int, folder: Path) -> str:
    """No spills, and shared memory that the GPU has. The PTX."""
    kernel = compiled(launch, architecture)
    ptx: str = kernel.asm["ptx"]
    registers, spilled = resources(ptx, architecture, folder)
    tile = [launch.arguments.get(key, 1) for key in ("ROWS", "TOKENS", "BLOCK")]
    print(f"{launch.program.__name__}, {tile}, sm_{architecture}: {registers}, {spilled}")
    assert spilled == 0
    assert kernel.metadata.shared <= SHARED[architecture]
    return ptx


def grid_launches(
    tokens: int, bits: int, group_size: int, dtype: torch.dtype, multiprocessors: int, columns: int
) -> list[Launch]:
    groups = -(-columns // group_size)
    operands = Operands(
        torch.zeros(192, columns, dtype=torch.uint8),
        torch.ones(192, groups),
        torch.zeros(192, groups),
        torch.zeros(192),
    )
    problem = Problem(192, columns, bits, group_size, False, None, "cpu", dtype)
    layer = w4a16.GridLinear(problem, operands)
    layer.multiprocessors = multiprocessors
    x = torch.zeros(tokens, columns, dtype=dtype)
    return layer.launches(x, x.new_empty(tokens, 192))


CASES = [
    (4, 32, torch.bfloat16),
    (4, 32, torch.float16),
    (4, 64, torch.bfloat16),
    (4, 64, torch.float16),
    (4, 128, torch.bfloat16),
    (4, 128, torch.float16),
    (2, 64, torch.float16),
    (2, 128, torch.bfloat16),
    (8, 64, torch.bfloat16),
    (8, 128, torch.bfloat16),
    (8, 128, torch.float16),
]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("bits", "group_size", "dtype"), CASES)
def test_w4a16(
    bits: int, group_size: int, dtype: torch.dtype, architecture: int, tmp_path: Path
) -> None:
    """Every program and tile, not split; several rows of x run on tensor cores."""
    one = grid_launches(1, bits, group_size, dtype, 1, 512)
    assert [launch.program for launch in one] == [w4a16.multiply_row]
    check(one[0], architecture, tmp_path)
    for tile in w4a16.TILES:
        tokens = tile.tokens + (tile is w4a16.TILES[-1])  # the last is as high as the one before
        (launch,) = grid_launches(tokens, bits, group_size, dtype, 1, 512)
        assert launch.arguments["BLOCK"] == group_size
        assert (launch.arguments["ROWS"], launch.warps) == (tile.rows, tile.warps)
        assert CORES[architecture] in check(launch, architecture, tmp_path)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("columns", [512, 500])
def test_w4a16_split_sums_and_odd_widths(columns: int, architecture: int, tmp_path: Path) -> None:
    """Parts in float32 and their addition; rows of x that do not start at multiples of 16."""
    for tokens in (1, 5):
        first, second = grid_launches(tokens, 4, 128, torch.bfloat16, 1000, columns)
        assert first.arguments["out"].dtype == torch.float32
        assert second.program is w4a16.add_parts
        check(first, architecture, tmp_path)
        check(second, architecture, tmp_path)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("token", torch.bfloat16),
        ("token", torch.float16),
        ("token", torch.float32),
        ("tensor", torch.bfloat16),
        ("dynamic_token", torch.bfloat16),
    ],
)
def test_w8a8(kind: ActivationKind, dtype: torch.dtype, architecture: int, tmp_path: Path) -> None:
    operands = Operands(
        torch.full((192, 512), 128, dtype=torch.uint8),
        torch.ones(192, 1),
        torch.full((192, 1), 128.0),
        torch.zeros(192),
    )
    problem = Problem(192, 512, 8, 512, True, kind, "cpu", dtype)
    layer = w8a8.Int8Linear(problem, operands)
    for tile in w8a8.TILES:
        x = torch.zeros(tile.tokens, 512, dtype=dtype)
        quantize, multiply = layer.launches(x, x.new_empty(tile.tokens, 192))
        assert (multiply.arguments["ROWS"], multiply.warps) == (tile.rows, tile.warps)
        check(quantize, architecture, tmp_path)
        assert CORES[architecture] in check(multiply, architecture, tmp_path)


def test_spills_are_counted(tmp_path: Path) -> None:
    """A tile that is known not to fit into registers, so that a silent assembler is noticed."""
    (launch,) = grid_launches(65, 4, 128, torch.bfloat16, 1, 512)
    launch.arguments.update(ROWS=256, TOKENS=128)
    ptx = compiled(launch, 80).asm["ptx"]
    assert resources(ptx, 80, tmp_path)[1] > 0
