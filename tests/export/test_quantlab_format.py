"""QuantLab's own folder: what is written comes back bit for bit, and takes the bytes it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from quantlab.blockwise import quantize_blocks
from quantlab.errors import ModelError
from quantlab.export import quantlab_format
from quantlab.layers import QuantLinear
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.packing import PackedWeight, describe
from tests.tiny import logits, tiny, token_ids

VARIANTS = ("nf4", "nf4:double_quant=false", "fp4:block_size=32", "llm_int8:threshold=2", "rtn:3")


def written(folder: Path, text: str) -> tuple[dict[str, PackedWeight], torch.Tensor]:
    """(packed weights, logits in float32) of a tiny model that was quantized and saved."""
    model, spec = tiny("qwen2"), parse_variant(text)  # with biases
    packed = quantize_blocks(model, METHODS[spec.method], configure(spec), None, lambda *_: None)
    quantlab_format.save(folder, model, packed, {"method": spec.method})
    return packed, logits(model.module, token_ids(1, 20))


@pytest.mark.parametrize("text", VARIANTS)
def test_a_folder_comes_back_bit_for_bit(text: str, tmp_path: Path) -> None:
    packed, before = written(tmp_path / "m", text)
    again, about = quantlab_format.load(tmp_path / "m")
    assert about["method"] == text.split(":")[0]
    for path, weight in packed.items():
        layer = again.module.get_submodule(path)
        assert isinstance(layer, QuantLinear)
        assert describe(layer.weight_packed) == describe(weight)
        for name, tensor in weight.tensors().items():
            assert torch.equal(layer.weight_packed.tensors()[name], tensor)
    # Biases, norms and embeddings are stored in bfloat16.
    after = logits(again.module, token_ids(1, 20))
    assert float((after - before).norm() / before.norm()) < 0.05


@pytest.mark.parametrize("text", VARIANTS)
def test_packed_weights_take_the_bytes_they_say(text: str, tmp_path: Path) -> None:
    packed, _ = written(tmp_path / "m", text)
    with safe_open(str(tmp_path / "m" / quantlab_format.WEIGHTS), "pt") as file:
        names = [name for name in list(file.keys()) if "::" in name]
        stored = sum(file.get_tensor(name).nbytes for name in names)
    assert stored == sum(weight.nbytes for weight in packed.values())


@pytest.mark.parametrize(("text", "field"), [("nf4", "rows"), ("llm_int8", "threshold")])
def test_a_damaged_description_is_refused(text: str, field: str, tmp_path: Path) -> None:
    written(tmp_path / "m", text)
    path = tmp_path / "m" / "quantlab.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    next(iter(about["packed"].values()))[field] = -1
    path.write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(ModelError, match="damaged"):
        quantlab_format.load(tmp_path / "m")
