"""Checkpoints that the peers wrote (scripts/golden_checkpoints.py), read without the peers.

What each peer's own code makes of its weights lies beside them, in `expected`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantlab.export import checkpoint, checkpoint_reader
from quantlab.layers import QuantLinear
from quantlab.models import locate
from quantlab.packing import AffineWeight, PackedWeight, PermutedWeight, describe
from tests.tiny import logits

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "checkpoints"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir())
WANTED = {
    "awq-4bit-g16", "awq-4bit-g32-sharded", "ct-w4a16-asym", "ct-w4a16-sym", "ct-w8a16-channel",
    "ct-w8a8-dynamic", "ct-w8a8-static-asym-sharded", "gptq-2bit-g16-asym-v2",
    "gptq-3bit-row-asym", "gptq-4bit-g16-act-order", "gptq-4bit-g16-sym", "gptq-4bit-g32-asym-v1",
    "gptq-8bit-g32-act-order-sharded", "gptq-mixed-bits",
}  # fmt: skip


def weights_of(name: str) -> dict[str, PackedWeight]:
    model, _ = checkpoint_reader.read(GOLDEN / name)
    layers = dict(model.module.named_modules())
    return {p: m.weight_packed for p, m in layers.items() if isinstance(m, QuantLinear)}


def inner(weight: PackedWeight) -> AffineWeight:
    found = weight.inner if isinstance(weight, PermutedWeight) else weight
    assert isinstance(found, AffineWeight)
    return found


def test_they_are_all_there() -> None:
    assert set(NAMES) == WANTED
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < 2**20


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_that_the_peer_makes_of_them(name: str) -> None:
    """Equal but for one rounding of (code - zero) * scale to the peer's float16."""
    assert locate(str(GOLDEN / name)).kind == "checkpoint"
    found = weights_of(name)
    expected = load_file(GOLDEN / name / "expected" / "weights.safetensors")
    assert found.keys() == expected.keys()
    assert len(found) == 7
    for path, wanted in expected.items():
        assert wanted.dtype == torch.float16
        ours = found[path].dequantize().double()
        smallest = 2.0**-25  # half a step of float16 near 0
        bound = ours.abs() * 2.0**-11 + smallest
        assert bool(((wanted.double() - ours).abs() <= bound).all()), path


@pytest.mark.parametrize(
    ("name", "bits", "group", "symmetric", "permuted"),
    [
        ("gptq-2bit-g16-asym-v2", 2, 16, False, False),
        ("gptq-3bit-row-asym", 3, None, False, False),
        ("gptq-4bit-g16-act-order", 4, 16, True, True),
        ("gptq-4bit-g16-sym", 4, 16, True, False),
        ("gptq-4bit-g32-asym-v1", 4, 32, False, False),
        ("gptq-8bit-g32-act-order-sharded", 8, 32, True, True),
        ("awq-4bit-g16", 4, 16, False, False),
        ("awq-4bit-g32-sharded", 4, 32, False, False),
        ("ct-w4a16-sym", 4, 16, True, False),
        ("ct-w4a16-asym", 4, 32, False, False),
        ("ct-w8a16-channel", 8, None, True, False),
        ("ct-w8a8-dynamic", 8, None, True, False),
        ("ct-w8a8-static-asym-sharded", 8, None, True, False),
    ],
)
def test_they_are_what_their_names_say(
    name: str, bits: int, group: int | None, symmetric: bool, permuted: bool
) -> None:
    found = weights_of(name)
    for weight in found.values():
        assert inner(weight).bits == bits
        assert inner(weight).group_size == (group or weight.shape[1])
        assert inner(weight).symmetric == symmetric
    # Linears of one group have no order to keep.
    assert any(isinstance(weight, PermutedWeight) for weight in found.values()) == permuted


def test_inputs_are_quantized_as_the_files_say() -> None:
    dynamic = weights_of("ct-w8a8-dynamic")
    assert {inner(w).activation.kind for w in dynamic.values()} == {"token"}  # type: ignore[union-attr]
    folder = GOLDEN / "ct-w8a8-static-asym-sharded"
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    for path, weight in weights_of(folder.name).items():
        activation = inner(weight).activation
        assert activation is not None
        assert activation.kind == "tensor"
        assert activation.scale == float(stored[f"{path}.input_scale"])
        assert activation.zero == int(stored[f"{path}.input_zero_point"]) + 128
        assert inner(weight).scales.shape == (1, 1)


def test_bits_of_their_own() -> None:
    found = weights_of("gptq-mixed-bits")
    for path, weight in found.items():
        assert inner(weight).bits == (8 if path.endswith("down_proj") else 4)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_read_is_written_and_read_again(name: str, tmp_path: Path) -> None:
    """Through the format's own writer, where it writes such weights (act-order it does not)."""
    model, about = checkpoint_reader.read(GOLDEN / name)
    found = weights_of(name)
    if any(isinstance(weight, PermutedWeight) for weight in found.values()):
        return
    folder = checkpoint.write(tmp_path / "m", about["format"], model, found)
    again, _ = checkpoint_reader.read(folder)
    for path, weight in found.items():
        other = again.module.get_submodule(path).weight_packed
        assert describe(other) == describe(weight)
        for field, tensor in weight.tensors().items():
            assert torch.equal(other.tensors()[field], tensor)
    ids = torch.arange(2, 18)[None]
    assert torch.equal(logits(again.module, ids), logits(model.module, ids))
