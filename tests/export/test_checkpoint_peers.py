"""The peers load what QuantLab writes, and say the same.

They live in .venv-peers (`make peers`); where one is missing its tests are skipped. All folders go
through one process a peer, since importing them takes longer than reading a tiny model.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantlab.blockwise import quantize_blocks
from quantlab.export import checkpoint, checkpoint_reader
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.packing import AffineWeight, OutlierWeight
from tests.tiny import logits, tiny, token_ids

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("peer_worker.py")
IDS = token_ids(1, 24)
SHARD = 60_000

CASES: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "gptqmodel": ("gptqmodel", "gptq", [
        ("qwen2", "rtn:4:symmetric=true"), ("llama", "rtn:3"), ("gpt2", "rtn:2"),
        ("llama", "rtn:8:granularity=channel"),
        ("llama", "mixed:arithmetic=rtn:pattern=*.o_proj=16"),
    ]),
    "gptq_transformers": ("gptqmodel", "gptq", [
        ("qwen2", "rtn:4:symmetric=true"), ("llama", "rtn:4"), ("llama", "gptq:8:symmetric=true"),
    ]),
    "awq_transformers": ("gptqmodel", "awq", [("qwen2", "rtn:4"), ("llama", "awq:4")]),
    "autoawq": ("awq", "awq", [("qwen2", "rtn:4"), ("llama", "awq:4")]),
    "compressed_tensors": ("gptqmodel", "compressed-tensors", [
        ("qwen2", "rtn:4"), ("opt", "rtn:8:symmetric=true"), ("llama", "mixed:arithmetic=rtn"),
        ("llama", "rtn:4:granularity=channel"), ("llama", "smoothquant:8"),
        ("qwen2", "smoothquant:8:activations=dynamic"),
        ("llama", "dynamic_int8:8:activations=token:per_channel=false"),
    ]),
    "bitsandbytes": ("gptqmodel", "bitsandbytes", [
        # Its code for CPUs takes blocks that divide a row only.
        ("llama", "nf4:4:block_size=32"), ("qwen2", "fp4:4:double_quant=false:block_size=32"),
        ("llama", "llm_int8:8"),
    ]),
}  # fmt: skip

MODULES = {
    "gptq_transformers": "optimum.gptq",
    "compressed_tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
}
"""What the environment may lack, because it was not asked for at first."""
ROUNDINGS = 48
"""Results that a token's state passes through in two blocks and the head, each rounded once: 7
linears, 2 norms (3 roundings), the rotation, scores, softmax, 2 residuals, products and
activations, about 22 a block."""


def environment(name: str) -> Path:
    return ROOT / ".venv-peers" / name / "bin" / "python"


def available(peer: str) -> str | None:
    """Why the peer cannot be asked, None where it can."""
    python = environment(CASES[peer][0])
    if not python.is_file():
        return f"{python.relative_to(ROOT)} is not there: make peers"
    module = MODULES.get(peer, "torch")
    done = subprocess.run(
        [str(python), "-c", f"import importlib.util as u; assert u.find_spec({module!r})"],
        capture_output=True,
        cwd=python.parent,
    )
    return None if done.returncode == 0 else f"{module} is not installed there: make peers"


def write(folder: Path, family: str, text: str, format: str) -> Path:
    model, spec = tiny(family), parse_variant(text)
    method, config = METHODS[spec.method], configure(spec, 32)
    plan = method.plan(model, IDS, config, lambda *_: None)
    packed = quantize_blocks(model, method, plan, token_ids(4, 24), lambda *_: None)
    return checkpoint.write(folder, format, model, packed, shard_bytes=SHARD)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Peer -> folders by case, each with what the peer made of it; skips where it is missing."""
    asked: dict[str, dict[str, Path]] = {}

    def ask(peer: str) -> dict[str, Path]:
        if reason := available(peer):
            pytest.skip(reason)
        if peer not in asked:
            name, format, cases = CASES[peer]
            home = tmp_path_factory.mktemp(peer)
            folders = {
                f"{family}-{text}": write(home / str(number), family, text, format)
                for number, (family, text) in enumerate(cases)
            }
            (home / "ids.json").write_text(json.dumps(IDS.tolist()))
            done = subprocess.run(
                [str(environment(name)), str(WORKER), peer, str(home / "ids.json"),
                 *map(str, folders.values())],
                capture_output=True, text=True, timeout=500, cwd=home,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            asked[peer] = folders
        return asked[peer]

    return ask


ALL = [(peer, f"{f}-{text}") for peer, (_, _, cases) in CASES.items() for f, text in cases]


@pytest.mark.parametrize(("peer", "case"), ALL, ids=lambda value: value)
def test_a_peer_says_the_same(
    peer: str, case: str, answers: Callable[[str], dict[str, Path]]
) -> None:
    folder = answers(peer)[case]
    said = load_file(f"{folder}.logits")
    theirs = said.pop("logits").double()
    model, _ = checkpoint_reader.read(folder, torch.float32)
    # bitsandbytes' int8 product takes float16.
    half = peer not in ("compressed_tensors", "bitsandbytes") or "llm_int8" in case
    unit = 2.0**-11 if half else 2.0**-24
    quantized = False
    assert said
    for path, wanted in said.items():
        weight = model.module.get_submodule(path).weight_packed
        quantized |= isinstance(weight, OutlierWeight)
        quantized |= isinstance(weight, AffineWeight) and weight.activation is not None
        ours = weight.dequantize().double()
        if not wanted.numel():  # a layer that has no function for it
            continue
        # The peer rounds (code - zero) * scale once, in the dtype of the scales.
        scales = weight.scales if isinstance(weight, AffineWeight) else ours
        step = 2.0**-11 if scales.dtype == torch.float16 else 2.0**-24
        assert bool(((wanted.double() - ours).abs() <= step * ours.abs() + 2.0**-25).all()), path
    ours = logits(model.module, IDS)
    error = float((theirs - ours).norm() / ours.norm())
    assert error < tolerance(model.module, ours, unit, quantized, half)


def tolerance(
    module: torch.nn.Module, ours: Tensor, unit: float, quantized: bool, half: bool
) -> float:
    """Relative error of the logits that roundings explain. Weights that the peer has rounded to
    float16 add a unit of float16 for each linear; inputs of 8 bits that fall on another side of a
    rounding boundary add a step of 1/127 each, of which few do in float32."""
    explained = ROUNDINGS * unit + 14 * 2.0**-11
    return explained + (0.02 if quantized else 0.0)


@pytest.mark.parametrize("peer", CASES)
def test_the_bound_would_notice(peer: str, answers: Callable[[str], dict[str, Path]]) -> None:
    """Zero-points off by one, or two columns of a word exchanged, are far outside of it."""
    folder = next(iter(answers(peer).values()))
    theirs = load_file(f"{folder}.logits")["logits"].double()
    model, _ = checkpoint_reader.read(folder, torch.float32)
    linear = model.module.get_submodule("model.layers.0.mlp.up_proj")
    weight = linear.weight_packed
    dense = weight.dequantize()
    steps = weight.scales.float() if isinstance(weight, AffineWeight) else dense.abs()
    for wrong in (dense + steps.mean(), dense[:, torch.arange(64) ^ 1]):
        plain = torch.nn.Linear(64, 96, bias=linear.bias is not None)
        plain.weight = torch.nn.Parameter(wrong)
        if linear.bias is not None:
            plain.bias = torch.nn.Parameter(linear.bias)
        model.module.set_submodule("model.layers.0.mlp.up_proj", plain)
        ours = logits(model.module, IDS)
        error = float((theirs - ours).norm() / ours.norm())
        assert error > ROUNDINGS * 2.0**-11 + 14 * 2.0**-11
