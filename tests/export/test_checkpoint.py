"""Every method in every format that can say it comes back as it was; the rest is refused first."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from quantlab.blockwise import quantize_blocks
from quantlab.delivery import check_format
from quantlab.errors import ConfigError, ModelError
from quantlab.export import checkpoint, checkpoint_reader
from quantlab.export.formats import FORMATS, check_shapes
from quantlab.layers import QuantLinear
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.models import LoadedModel, load, locate
from quantlab.models.outline import outline_of
from quantlab.packing import (
    AffineWeight,
    CodebookWeight,
    GGMLWeight,
    OutlierWeight,
    PackedWeight,
    Storage,
    affine,
    describe,
)
from quantlab.types import VariantSpec
from tests.tiny import logits, saved, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact")

GROUP = 32
IDS = token_ids(2, 16)
QUANTIZING = [name for name, method in METHODS.items() if method.packs]
VARIANTS = [f"{name}:{bits}" for name in QUANTIZING for bits in METHODS[name].bits] + [
    "rtn:4:symmetric=true", "rtn:8:symmetric=true", "rtn:4:granularity=channel",
    "rtn:4:granularity=tensor", "rtn:4:group_size=24", "rtn:4:group_size=65536", "gguf:q8_0",
    "gptq:4:symmetric=true", "gptq:4:act_order=false:static_groups=false", "awq:4:symmetric=true",
    "rtn:4:head_bits=8", "smoothquant:8:activations=dynamic", "dynamic_int8:8:activations=token",
    "dynamic_int8:8:activations=token:per_channel=false", "mixed",
    "mixed:attention_bits=16:feed_forward_bits=4", "mixed:arithmetic=rtn:preset=all-4",
    "mixed:arithmetic=rtn:preset=all-4:symmetric=true", "mixed:pattern=*=4;*.down_proj=5",
]  # fmt: skip
REPRESENTATIONS = {
    AffineWeight: "affine",
    CodebookWeight: "codebook",
    OutlierWeight: "outlier",
    GGMLWeight: "ggml",
}


@functools.cache
def quantized(text: str) -> tuple[LoadedModel, dict[str, PackedWeight]]:
    """A model of one block with biases (qwen2), its head apart."""
    model, spec = tiny("qwen2", blocks=1), parse_variant(text)
    method, config = METHODS[spec.method], configure(spec, GROUP)
    plan = method.plan(model, IDS, config, lambda *_: None)
    packed = quantize_blocks(model, method, plan, IDS, lambda *_: None)
    return model, packed


def storage_of(text: str) -> Storage:
    spec = parse_variant(text)
    return METHODS[spec.method].storage(configure(spec, GROUP))


def refused(text: str, format: str, folder: Path) -> str | None:
    """Why `quantize` refuses this, before any weight is read."""
    spec = parse_variant(text)
    try:
        check_format(spec, format, GROUP)
        check_shapes(FORMATS[format], storage_of(text), outline_of(folder), text)
    except ConfigError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return saved(folder / "qwen2", "qwen2")


@pytest.mark.parametrize("text", VARIANTS)
def test_a_method_stores_what_it_says(text: str) -> None:
    """`storage`, on which every refusal rests."""
    storage = storage_of(text)
    _, packed = quantized(text)
    for weight in packed.values():
        assert REPRESENTATIONS[type(weight)] == storage.representation  # type: ignore[index]
        if not isinstance(weight, AffineWeight):
            continue
        assert weight.bits in storage.bits
        assert weight.group_size == storage.group(weight.columns)
        assert weight.symmetric == storage.symmetric
        assert (weight.scales.shape[0] == 1) == storage.one_scale
        kind = None if weight.activation is None else weight.activation.kind
        assert kind == storage.activation
    affine = [w for w in packed.values() if isinstance(w, AffineWeight)]
    assert not affine or {w.bits for w in affine} == set(storage.bits)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("text", VARIANTS)
def test_what_can_be_said_comes_back(text: str, format: str, qwen: Path, tmp_path: Path) -> None:
    reason = refused(text, format, qwen)
    if reason is not None:
        assert reason.startswith(("format: ", "method: onnx_int8"))
        assert "\n" not in reason
        return
    model, packed = quantized(text)
    folder = checkpoint.write(tmp_path / "m", format, model, packed)
    assert locate(str(folder)).kind == "checkpoint"
    again, about = checkpoint_reader.read(folder)
    for path, weight in packed.items():
        layer = again.module.get_submodule(path)
        assert isinstance(layer, QuantLinear)
        found = layer.weight_packed
        assert describe(found) == describe(weight)
        for name, tensor in weight.tensors().items():
            assert found.tensors()[name].dtype == tensor.dtype
            assert torch.equal(found.tensors()[name], tensor), (path, name)
        assert (layer.bias is None) == (model.module.get_submodule(path).bias is None)
    # Biases, norms, embedding and head are stored in bfloat16.
    before, after = logits(model.module, IDS), logits(again.module, IDS)
    assert float((after - before).norm() / before.norm()) < 0.05
    assert about["format"] == format
    kept = [w.bits for w in packed.values() if isinstance(w, AffineWeight)]
    assert about["bits"] == (min(kept) if kept else parse_variant(text).bits)


def test_every_format_says_something_and_nothing_says_everything() -> None:
    said = {
        (text, format): FORMATS[format].refusal(storage_of(text)) is None
        for text in VARIANTS
        for format in FORMATS
    }
    for format in FORMATS:
        assert {said[text, format] for text in VARIANTS} == {True, False}
    wanted = {
        "gptq": {"gptq:2", "gptq:3", "gptq:4", "gptq:8", "awq:4", "rtn:3", "efficientqat:2"},
        "awq": {"gptq:4", "awq:4", "rtn:4", "qat:4"},
        "compressed-tensors": {"awq:4", "smoothquant:8", "static_int8:8", "gptq:8", "rtn:4"},
        "bitsandbytes": {"nf4:4", "fp4:4", "llm_int8:8"},
    }
    for format, texts in wanted.items():
        assert all(said[text, format] for text in texts)
    for text in ("gguf:q8_0", "onnx_int8:8"):
        assert not any(said[text, format] for format in FORMATS)


@pytest.mark.parametrize(
    ("text", "format", "words"),
    [
        ("awq:3", "awq", "AWQ files hold 4 bits, not 3"),
        ("nf4", "gptq", "GPTQ files hold no codebooks"),
        ("llm_int8", "compressed-tensors", "no int8 weights that meet outlier inputs"),
        ("rtn:5", "gptq", "2, 3, 4 and 8 bits, not 5"),
        ("rtn:3", "compressed-tensors", "4 and 8 bits, not 3"),
        ("smoothquant", "gptq", "nothing of how inputs are quantized"),
        ("dynamic_int8", "compressed-tensors", "not one for the whole input"),
        ("rtn:4:granularity=tensor", "gptq", "not one for a matrix"),
        ("awq:4:symmetric=true", "awq", "symmetric=false has them"),
        ("gptq:4:embedding_bits=8:head_bits=8", "gptq", "embedding and head in 16 bits"),
        ("rtn:4:group_size=64", "gptq", "groups of 64 do not divide 96 columns"),
        ("rtn:4:group_size=24", "awq", "take groups of 16, 32, 64 and 128, or a row, not 24"),
        ("mixed:budget=5", "gptq", "not 5 and 6"),
        ("gptq", "bitsandbytes", "NF4, FP4 and LLM.int8(), not integer grids"),
        ("nf4:embedding_bits=8:head_bits=8", "bitsandbytes", "embedding and head in 16 bits"),
    ],
)
def test_refusals_say_why(text: str, format: str, words: str, qwen: Path) -> None:
    reason = refused(text, format, qwen)
    assert reason is not None
    assert words in reason


def test_gpt2_is_written_transposed_and_only_as_gptq(tmp_path: Path) -> None:
    saved(tmp_path / "gpt2", "gpt2")
    for format in ("awq", "compressed-tensors"):
        reason = refused("rtn:4", format, tmp_path / "gpt2")
        assert reason is not None
        assert "Conv1D" in reason
    model = tiny("gpt2", blocks=1)
    spec = parse_variant("mixed:arithmetic=rtn:attention_bits=16")
    config = configure(spec, GROUP)
    method = METHODS["mixed"]
    plan = method.plan(model, None, config, lambda *_: None)
    packed = quantize_blocks(model, method, plan, None, lambda *_: None)
    folder = checkpoint.write(tmp_path / "m", "gptq", model, packed)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_slice("transformer.h.0.attn.c_attn.weight").get_shape() == [64, 192]
        assert file.get_slice("transformer.h.0.mlp.c_fc.qweight").get_shape() == [8, 96]
    again, _ = checkpoint_reader.read(folder, torch.float32)
    wanted = model.module.get_submodule("transformer.h.0.attn.c_attn").weight
    found = again.module.get_submodule("transformer.h.0.attn.c_attn").weight
    assert torch.equal(found, wanted.to(torch.bfloat16).float())
    before, after = logits(model.module, IDS), logits(again.module, IDS)
    assert float((after - before).norm() / before.norm()) < 0.05


def test_shards_and_their_index(tmp_path: Path) -> None:
    model, packed = quantized("rtn:4")
    whole = checkpoint.write(tmp_path / "whole", "gptq", model, packed)
    split = checkpoint.write(tmp_path / "split", "gptq", model, packed, shard_bytes=20_000)
    files = sorted(file.name for file in split.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    first, second = (checkpoint_reader.read(folder)[0] for folder in (whole, split))
    assert torch.equal(logits(first.module, IDS), logits(second.module, IDS))


def test_the_folder_says_what_older_readers_need(tmp_path: Path) -> None:
    model, packed = quantized("rtn:4:symmetric=true")
    folder = checkpoint.write(tmp_path / "m", "gptq", model, packed)
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    settings = json.loads((folder / "quantize_config.json").read_text())
    assert settings == config["quantization_config"]
    known = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "quant_method": "gptq"}
    assert known.items() <= settings.items()
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert locate(str(folder)).kind == "checkpoint", "quantize_config.json alone says enough"
    checkpoint_reader.read(folder)


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    model, packed = quantized("rtn:4")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "diary.txt").write_text("dear diary")
    with pytest.raises(ConfigError, match="holds other files"):
        checkpoint.write(folder, "gptq", model, packed)
    with pytest.raises(ConfigError, match="is a file"):
        checkpoint.write(folder / "diary.txt", "gptq", model, packed)
    assert [file.name for file in tmp_path.rglob("*")] == ["m", "diary.txt"]


def test_nothing_half_written_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, packed = quantized("rtn:4")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(tmp_path / "m", "awq", model, packed)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_differ_more_than_a_format_can_say(tmp_path: Path) -> None:
    model, packed = quantized("rtn:4")
    path = next(iter(packed))
    rows, columns = packed[path].shape
    scales = torch.ones(rows, columns // 16)
    odd = affine(torch.zeros(rows, columns), scales, scales, 4, 16)
    for format in ("gptq", "awq"):
        with pytest.raises(ConfigError, match="one group size for all linears"):
            checkpoint.write(tmp_path / "m", format, model, {**packed, path: odd})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_no_original(tmp_path: Path) -> None:
    model, packed = quantized("rtn:4")
    folder = checkpoint.write(tmp_path / "m", "awq", model, packed)
    with pytest.raises(ModelError, match="already quantized"):
        load(str(folder))
    with pytest.raises(ConfigError, match="nothing to write"):
        check_format(VariantSpec("checkpoint", None, (("path", str(folder)),)), "gptq")
