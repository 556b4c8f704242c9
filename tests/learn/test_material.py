"""Slices: where they come from, that they are the model's own numbers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantlab.errors import ModelError
from quantlab.learn import capture, material
from quantlab.models import block_list, load
from tests.tiny import saved, tiny, token_ids


def test_what_ships_is_small_and_says_where_it_is_from() -> None:
    assert material.BUNDLED.stat().st_size < 300_000
    origin = material.origin()
    assert origin.model == "bundled"
    assert origin.machine
    assert origin.date.startswith("20")
    for layer in material.layers():
        one = material.load(layer=layer)
        assert one.weight.shape == (material.ROWS, material.COLUMNS)
        assert one.inputs.shape == (material.TOKENS, material.COLUMNS)
        assert one.channels[-1] < one.shape[1]
        assert 0 < float(one.inputs.abs().max()) <= one.peak * 1.001


def test_listening_keeps_what_each_linear_reads() -> None:
    model = tiny(width=64)
    ids = token_ids(2, 16)
    blocks = block_list(model.module, model.family)
    seen: dict[str, Tensor] = {}
    handles = [
        linear.register_forward_hook(
            lambda _, args, __, name=f"{index}.{path}": seen.__setitem__(
                name, args[0].reshape(32, -1)
            )
        )
        for index, block in enumerate(blocks)
        for path, linear in block.named_modules()
        if isinstance(linear, torch.nn.Linear)
    ]
    steps: list[tuple[str, int, int]] = []
    found = capture.listen(model.module, blocks, ids, "tiny", lambda *step: steps.append(step))
    for handle in handles:
        handle.remove()
    assert found.keys() == seen.keys()
    assert steps == [("capture", 1, 2), ("capture", 2, 2)]
    for layer, one in found.items():
        index, _, path = layer.partition(".")
        weight = blocks[int(index)].get_submodule(path).weight
        assert one.shape == tuple(weight.shape)
        columns = slice(one.first, one.first + one.weight.shape[1])
        assert torch.equal(one.weight, weight[: material.ROWS, columns].half().float())
        assert torch.equal(one.inputs, seen[layer][:, columns].half().float())
        assert one.peak == float(seen[layer].abs().max())
    assert not any(module._forward_pre_hooks for module in model.module.modules())


def test_the_window_holds_the_largest_channel() -> None:
    for count, top in ((576, 0), (576, 575), (576, 300), (1536, 700), (256, 9), (64, 3)):
        peaks = torch.ones(count)
        peaks[top] = 9
        first = material.window(peaks)
        assert first <= top < first + 256
        assert 0 <= first <= max(count - 256, 0)


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    one = material.random()
    origin = material.Origin("m", "f", "project", 7, "cpu", "2026-01-01")
    path = tmp_path / "new" / "x.safetensors"
    material.write(path, origin, {"0.a": one, "1.b": material.sub(one, 2, 8, 4)})
    assert material.origin(path) == origin
    assert material.layers(path) == ["0.a", "1.b"]
    again = material.load(path, "0.a")
    assert torch.equal(again.weight, one.weight)
    assert torch.equal(again.inputs, one.inputs)
    assert (again.model, again.layer, again.shape, again.peak) == ("m", "0.a", one.shape, one.peak)
    assert material.load(path, "1.b").first == 4
    assert material.load(path, "nothing like it").layer == "0.a"
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_a_broken_file_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ModelError, match="is gone; load the model again"):
        material.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="cannot be read"):
        material.load(path)


def test_the_error_is_of_the_output() -> None:
    one = material.random()
    assert one.output_error(one.weight) == 0
    assert one.output_error(torch.zeros_like(one.weight)) == pytest.approx(1)
    assert torch.allclose(one.moment, sum(x[:, None] * x for x in one.inputs) / 32, rtol=1e-4)


def run(model: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, object]]]:
    code = capture.main([model])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_model_is_read_once_and_found_again(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "model")
    code, told = run(str(folder), capsys)
    assert code == 0
    assert {"stage": "capture", "done": 2, "total": 2} in told
    path = Path(str(told[-1]["path"]))
    assert path.is_relative_to(home / "learn")
    loaded = load(str(folder))
    one = material.load(path, "1.mlp.up_proj")
    weight = loaded.module.model.layers[1].mlp.up_proj.weight
    assert torch.equal(one.weight, weight[: material.ROWS].half().float())
    before = path.stat().st_mtime_ns
    code, told = run(str(folder), capsys)
    assert (code, told) == (0, [{"path": str(path)}])
    assert path.stat().st_mtime_ns == before


def test_a_model_that_is_not_there(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = run(str(tmp_path / "none"), capsys)
    assert code == 2
    assert "no such file or folder" in str(told[-1]["error"])
    assert not list(home.rglob("*.safetensors"))
