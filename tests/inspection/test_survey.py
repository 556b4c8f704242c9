"""The survey of a model: every figure against plain torch on the model's own inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantlab.errors import ModelError
from quantlab.inspection import capture, survey
from quantlab.inspection.survey import BINS, GROUP_SIZE, WIDTHS, WORST, WORST_BITS, decode, encode
from quantlab.learn import capture as learn
from quantlab.learn import material
from quantlab.models import LoadedModel, locate
from tests.tiny import recorded_inputs, saved, tiny, token_ids

IDS = token_ids(3, 32)


def inputs_of(model: LoadedModel) -> dict[str, Tensor]:
    """Every linear's input, float64 [tokens, columns], by its short name."""
    with recorded_inputs(model.family, model.module) as seen, torch.no_grad():
        model.module(IDS, use_cache=False)
    prefix = f"{model.family.blocks}."
    return {path.removeprefix(prefix): torch.cat(parts) for path, parts in seen.items()}


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Zero-point rounding in groups (the last one ragged), scales in float16: float64."""
    parts = []
    for part in weight.float().split(GROUP_SIZE, dim=1):
        low, high = part.amin(1, True).clamp_max(0), part.amax(1, True).clamp_min(0)
        step = (high - low) / (2**bits - 1)
        zero = torch.round(-low / step)
        step = step.half().float()
        codes = (torch.round(part / step) + zero).clamp(0, 2**bits - 1)
        parts.append((codes - zero) * step)
    return torch.cat(parts, 1).double()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_figure_is_that_of_plain_torch(name: str) -> None:
    model = tiny(name)
    steps: list[tuple[str, int, int]] = []
    found = capture.survey(model, IDS, lambda *step: steps.append(step))
    seen = inputs_of(model)
    assert list(found.linears) == list(seen)
    assert steps == [("survey", 0, 2), ("survey", 1, 2), ("survey", 2, 2)]
    assert (found.blocks, found.origin.tokens) == (2, 96)
    blocks = model.module.get_submodule(model.family.blocks)
    for path, one in found.linears.items():
        x, w = seen[path], blocks.get_submodule(path).weight.detach().double()
        assert one.shape == tuple(w.shape)
        torch.testing.assert_close(one.read.peaks.double(), x.abs().amax(0), rtol=1e-4, atol=1e-5)
        assert one.read.low == pytest.approx(float(x.min()), rel=1e-4)
        assert one.read.high == pytest.approx(float(x.max()), rel=1e-4)
        moment = x.t() @ x / len(x)
        for bits in WIDTHS:
            change = rounded(w, bits) - w
            expected = change.square().sum() / w.square().sum()
            assert one.weight_errors[bits] == pytest.approx(float(expected), rel=1e-3)
            expected = (x @ change.t()).square().sum() / (x @ w.t()).square().sum()
            assert one.output_errors[bits] == pytest.approx(float(expected), rel=2e-3)
        change = rounded(w, WORST_BITS) - w
        added = change.square().sum(0) * moment.diagonal()
        order = added.argsort(descending=True)[:WORST]
        assert [channel for channel, _ in one.worst] == order.tolist()
        shares = [share for _, share in one.worst]
        assert shares == pytest.approx((added[order] / added.sum()).tolist(), rel=1e-3)
        assert one.largest == float(w.abs().max())
        edges = torch.linspace(-one.largest, one.largest, BINS + 1, dtype=torch.float64)
        counts = torch.histogram(w.reshape(-1), edges).hist
        # A weight on the edge of two bins falls on either side.
        assert int((one.histogram - counts).abs().sum()) <= 2
        assert int(one.histogram.sum()) == w.numel()
        whole = w[:, : w.shape[1] // GROUP_SIZE * GROUP_SIZE].reshape(-1, GROUP_SIZE)
        spans = whole.amax(1) - whole.amin(1)
        top = whole[spans.argmax()]
        assert one.widest == (float(top.min()), float(top.max()))
        middle = spans.sort().values[len(spans) // 2]
        assert one.usual[1] - one.usual[0] == pytest.approx(float(middle))


@pytest.mark.usefixtures("exact")
def test_linears_that_read_the_same_share_their_input() -> None:
    model = tiny("llama")
    found = capture.survey(model, IDS).linears
    attention = [found[f"0.self_attn.{name}_proj"] for name in "qkv"]
    assert len({id(one.read) for one in attention}) == 1
    blocks = model.module.get_submodule(model.family.blocks)
    weights = [blocks.get_submodule(one.name).weight.abs().amax(0) for one in attention]
    assert torch.equal(attention[0].read.weights, torch.stack(weights).amax(0))
    kinds = {path: found[f"1.{path}"].read.fold for path in ("self_attn.q_proj", "mlp.up_proj")}
    assert set(kinds.values()) == {"norm"}
    assert found["1.self_attn.o_proj"].read.fold == "value"
    assert found["1.mlp.down_proj"].read.fold == "linear"
    assert not any(m._forward_pre_hooks for m in model.module.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("ratio", [1.0, 30.0, 2e3, 1e12])
def test_logarithms_come_back_within_half_a_step(ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = 3.0 * ratio ** torch.rand(200, generator=generator, dtype=torch.float64)
    codes, ends = encode(values.float())
    back = decode(codes, ends).double()
    kept = values.clamp_min(float(values.max()) * survey.SPAN)
    bound = (float(kept.max() / kept.min())) ** (1 / 510) * (1 + 1e-5)
    off = torch.maximum(back / kept, kept / back)
    assert float(off.max()) <= bound
    assert codes.dtype == torch.uint8


def test_silent_channels_do_not_break_it() -> None:
    codes, ends = encode(torch.tensor([0.0, 2.0, 0.0]))
    assert decode(codes, ends).tolist() == pytest.approx([2e-7, 2.0, 2e-7], rel=1e-4)
    codes, ends = encode(torch.zeros(3))
    assert float(decode(codes, ends).max()) < 1e-20


def test_a_file_comes_back(tmp_path: Path) -> None:
    found = capture.survey(tiny("llama"), IDS)
    path = tmp_path / "new" / "x.safetensors"
    survey.write(path, found)
    again = survey.load(path)
    assert again.origin == found.origin
    assert again.attention == found.attention == (4, 2, 16)
    assert list(again.linears) == list(found.linears)
    for name, one in found.linears.items():
        back = again.linears[name]
        assert (back.shape, back.kind, back.read.fold) == (one.shape, one.kind, one.read.fold)
        assert back.output_errors == pytest.approx(one.output_errors)
        assert back.weight_errors == pytest.approx(one.weight_errors)
        assert [channel for channel, _ in back.worst] == [channel for channel, _ in one.worst]
        assert torch.equal(back.histogram, one.histogram)
        assert (*back.widest, *back.usual) == pytest.approx((*one.widest, *one.usual))
        torch.testing.assert_close(back.read.peaks, one.read.peaks, rtol=0.02, atol=0)
        torch.testing.assert_close(back.read.weights, one.read.weights, rtol=0.02, atol=0)
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_a_broken_file_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ModelError, match="is gone; read the model again"):
        survey.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="cannot be read"):
        survey.load(path)


def test_what_ships_is_small_and_whole() -> None:
    assert survey.BUNDLED.stat().st_size < 280_000
    found = survey.load()
    assert (found.blocks, len(found.linears), len(found.paths)) == (30, 210, 7)
    assert found.origin.model == "bundled"
    assert found.origin.fingerprint == material.origin().fingerprint
    assert found.origin.machine
    one = found.linears["11.mlp.down_proj"]
    assert one.shape == (576, 1536)
    # The slice that the Learn tab ships saw the same channel, on other tokens.
    slice_ = material.load(layer=one.name)
    assert int(one.read.peaks.argmax()) in slice_.channels
    assert float(one.read.peaks.max()) == pytest.approx(slice_.peak, rel=0.2)
    for other in found.linears.values():
        errors = [other.output_errors[bits] for bits in WIDTHS]
        assert errors == sorted(errors, reverse=True)


def run(model: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, object]]]:
    code = capture.main([model])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_model_is_read_once_and_found_again(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "model")
    code, told = run(str(folder), capsys)
    assert code == 0
    assert {"stage": "survey", "done": 2, "total": 2} in told
    path = Path(str(told[-1]["path"]))
    assert path.is_relative_to(home / "inspect")
    found = survey.load(path)
    slices = learn.file_of(locate(str(folder)).fingerprint)
    assert material.layers(slices) == list(found.linears)
    assert found.origin.tokens == 2048
    code, told = run(str(folder), capsys)
    assert (code, told) == (0, [{"path": str(path)}])
    code, told = run(str(tmp_path / "none"), capsys)
    assert code == 2
    assert "no such file or folder" in str(told[-1]["error"])
