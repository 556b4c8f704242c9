"""Checkpoints that are damaged, or made to do damage: one message each, and nothing is touched."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.blockwise import quantize_blocks
from quantlab.cli import main
from quantlab.errors import ConfigError, ModelError
from quantlab.export import checkpoint, checkpoint_reader
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.models import locate
from quantlab.models.quantization import quantization_of
from tests.tiny import saved, tiny

FORMATS = ("gptq", "awq", "compressed-tensors")
PATH = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a format, and an int8 one."""
    home = tmp_path_factory.mktemp("sound")
    model = tiny(blocks=1)
    spec = parse_variant("rtn:4")
    packed = quantize_blocks(model, METHODS["rtn"], configure(spec, 32), None, lambda *_: None)
    for format in FORMATS:
        checkpoint.write(home / format, format, model, packed)
    model, spec = tiny(blocks=1), parse_variant("dynamic_int8:8:activations=token")
    packed = quantize_blocks(model, METHODS["dynamic_int8"], configure(spec), None, lambda *_: None)
    checkpoint.write(home / "int8", "compressed-tensors", model, packed)
    return home


@pytest.fixture
def spoil(sound: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda format: shutil.copytree(sound / format, tmp_path / "spoilt")


def refusal(folder: Path) -> str:
    """The one message with which reading is refused; the folder stays as it is."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    around = sorted(folder.parent.rglob("*"))
    with pytest.raises(ModelError) as caught:
        checkpoint_reader.read(Path(str(locate(str(folder)).path)))
    message = str(caught.value)
    assert message.startswith("model: ")
    assert "\n" not in message
    assert len(message) < 500
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sorted(folder.parent.rglob("*")) == around
    return message


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Replace (or, with None, remove) fields of `PATH`."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    for field, tensor in tensors.items():
        stored.pop(f"{PATH}.{field}")
        if tensor is not None:
            stored[f"{PATH}.{field}"] = tensor
    save_file(stored, file, metadata={"format": "pt"})


def field(folder: Path, name: str) -> Tensor:
    return load_file(folder / "model.safetensors")[f"{PATH}.{name}"]


def settings(folder: Path, **changes: Any) -> None:
    """Change `quantization_config`; None removes a key."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config["quantization_config"][key] = value
        if value is None:
            del config["quantization_config"][key]
    (folder / "config.json").write_text(json.dumps(config))


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file(format: str, spoil: Callable[[str], Path]) -> None:
    folder = spoil(format)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "corrupt or truncated" in refusal(folder)


def test_a_header_of_absurd_size(spoil: Callable[[str], Path]) -> None:
    folder = spoil("gptq")
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    assert "corrupt or truncated" in refusal(folder)


def test_a_file_that_is_no_safetensors(spoil: Callable[[str], Path]) -> None:
    folder = spoil("awq")
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "corrupt or truncated" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..\\m.safetensors",
     "model.bin", "", "D:\\m.safetensors"],
)  # fmt: skip
def test_shards_outside_of_the_folder(name: str, spoil: Callable[[str], Path]) -> None:
    folder = spoil("gptq")
    shutil.copy(folder / "model.safetensors", folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {f"{PATH}.qweight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(folder)
    assert "which is no .safetensors file of this folder" in message


def test_a_shard_that_is_not_there(spoil: Callable[[str], Path]) -> None:
    folder = spoil("gptq")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks the shard model-00002" in refusal(folder)


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_says_nothing(index: str, spoil: Callable[[str], Path]) -> None:
    folder = spoil("gptq")
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(folder)


def test_a_tensor_in_two_files(spoil: Callable[[str], Path]) -> None:
    folder = spoil("awq")
    shutil.copy(folder / "model.safetensors", folder / "more.safetensors")
    assert "in two files" in refusal(folder)


def test_only_pickles(spoil: Callable[[str], Path]) -> None:
    folder = spoil("gptq")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "holds no .safetensors weights" in refusal(folder)


def test_code_of_its_own(spoil: Callable[[str], Path]) -> None:
    folder = spoil("gptq")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "--trust-remote-code" in refusal(folder)


def test_a_configuration_that_asks_for_more_memory_than_there_is(
    spoil: Callable[[str], Path],
) -> None:
    folder = spoil("gptq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2**40}))
    assert "[384, 64]; expected" in refusal(folder)


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "changes", "words"),
    [
        ("gptq", {"quant_method": "hqq"}, "is quantized by 'hqq'; QuantLab reads gptq, awq,"),
        ("gptq", {"quant_method": None}, "is quantized by None"),
        ("gptq", {"quant_method": ["gptq"]}, "is quantized by ['gptq']"),
        ("gptq", {"bits": 5}, "bits 5; QuantLab reads 2, 3, 4, 8"),
        ("gptq", {"bits": 2**70}, "QuantLab reads 2, 3, 4, 8"),
        ("gptq", {"bits": "4"}, "bits '4'"),
        ("gptq", {"bits": True}, "bits True"),
        ("gptq", {"group_size": 0}, "group_size 0; it must be -1"),
        ("gptq", {"group_size": -7}, "group_size -7"),
        ("gptq", {"group_size": 10**12}, "group_size 1000000000000"),
        ("gptq", {"sym": "yes"}, "neither true nor false"),
        ("gptq", {"checkpoint_format": "marlin"}, "in the layout 'marlin'"),
        ("gptq", {"pack_dtype": "int16"}, "not int32"),
        ("gptq", {"bits": 8}, "has qweight of I32 [12, 64]; expected I32 [24, 64]"),
        ("gptq", {"group_size": 16}, "has qzeros of I32 [3, 8]; expected I32 [6, 8]"),
        ("awq", {"bits": 3}, "bits 3; QuantLab reads 4"),
        ("awq", {"version": "gemv"}, "in the layout 'gemv'; QuantLab reads gemm"),
        ("awq", {"zero_point": False}, "without zero-points"),
        ("compressed-tensors", {"format": "float-quantized"}, "QuantLab reads pack-quantized"),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "has a kv_cache_scheme"),
        ("compressed-tensors", {"sparsity_config": {"format": "sparse-24"}}, "a sparsity_config"),
        ("compressed-tensors", {"config_groups": {}}, "no config_groups"),
        ("compressed-tensors", {"config_groups": {"a": []}}, "without settings for weights"),
        ("compressed-tensors", {"quantization_status": "frozen"}, "reads 'compressed'"),
    ],
)
def test_settings_that_are_not_read(
    format: str, changes: dict[str, Any], words: str, spoil: Callable[[str], Path]
) -> None:
    folder = spoil(format)
    if "format" in changes:
        strip_formats(folder)
    settings(folder, **changes)
    assert words in refusal(folder)


def strip_formats(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        del group["format"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("where", "changes", "words"),
    [
        ("weights", {"type": "float"}, "weights of type 'float'"),
        ("weights", {"num_bits": 16}, "num_bits 16"),
        ("weights", {"strategy": "block"}, "scales by 'block'"),
        ("input_activations", {"strategy": "group"}, "quantizes inputs by 'group'"),
        ("input_activations", {"num_bits": 4}, "num_bits of inputs 4"),
        (None, {"output_activations": {"num_bits": 8}}, "outputs of linears"),
        (None, {"targets": ["re:(a+)+$"]}, "no usable pattern"),
        (None, {"targets": ["re:("]}, "no usable pattern"),
        (None, {"targets": "Linear"}, "without targets"),
    ],
)
def test_schemes_that_are_not_run(
    where: str | None, changes: dict[str, Any], words: str, spoil: Callable[[str], Path]
) -> None:
    folder = spoil("int8")
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    (group if where is None else group[where]).update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    assert words in refusal(folder)


def test_plain_folders_are_no_checkpoints(tmp_path: Path) -> None:
    assert quantization_of(saved(tmp_path / "plain")) is None
    with pytest.raises(ModelError, match="is not quantized"):
        checkpoint_reader.read(tmp_path / "plain")


# --- tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize(
    ("format", "name"), [("gptq", "scales"), ("awq", "scales"), ("int8", "weight_scale")]
)
def test_scales_that_are_none(
    format: str, name: str, bad: float, spoil: Callable[[str], Path]
) -> None:
    folder = spoil(format)
    scales = field(folder, name)
    scales[0, 0] = bad
    change(folder, **{name: scales})
    message = refusal(folder)
    assert PATH in message
    assert ("negative" if bad == -1 else "not finite") in message


@pytest.mark.parametrize("format", [*FORMATS, "int8"])
def test_missing_misshapen_and_mistyped_tensors(format: str, sound: Path, tmp_path: Path) -> None:
    names = {
        name.rpartition(".")[2]
        for name in load_file(sound / format / "model.safetensors")
        if name.startswith(PATH)
    }
    for number, name in enumerate(sorted(names)):
        folder = shutil.copytree(sound / format, tmp_path / f"m{number}" / "m")
        whole = field(folder, name)
        change(folder, **{name: whole[:-1].clone()})
        assert f"has {name} of" in refusal(folder)
        change(folder, **{name: whole.to(torch.float64)})
        assert f"has {name} of F64" in refusal(folder)
        change(folder, **{name: None})
        if name not in ("g_idx", "weight_scale", "qweight"):
            assert f"lacks its {name}" in refusal(folder)
        elif name != "g_idx":
            refusal(folder)


def test_a_g_idx_out_of_range(spoil: Callable[[str], Path]) -> None:
    folder = spoil("gptq")
    index = field(folder, "g_idx")
    index[5] = 2**31 - 1
    change(folder, g_idx=index)
    assert "g_idx names groups outside of 0 to 1" in refusal(folder)


def test_a_weight_shape_that_lies(spoil: Callable[[str], Path]) -> None:
    folder = spoil("compressed-tensors")
    change(folder, weight_shape=torch.tensor([96, 2**40]))
    assert "weight_shape is" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model.layers.7.mlp.up_proj.qweight", torch.zeros(8, 8, dtype=torch.int32), "no linear"),
        ("model.norm.qweight", torch.zeros(8, 8, dtype=torch.int32), "no linear"),
        ("model.norm.extra", torch.zeros(8), "unexpected tensor"),
        ("surprise", torch.zeros(8), "unexpected tensor"),
        ("model.norm.weight", torch.zeros(7), "has model.norm.weight of F32 [7]"),
        ("model.norm.weight", torch.full((64,), float("nan")), "model.norm.weight is not finite"),
        ("model.norm.weight", None, "lacks 1 weights, such as model.norm.weight"),
    ],
)
def test_other_tensors(
    name: str, tensor: Tensor | None, words: str, spoil: Callable[[str], Path]
) -> None:
    folder = spoil("gptq")
    stored = load_file(folder / "model.safetensors")
    stored.pop(name, None)
    if tensor is not None:
        stored[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert words in refusal(folder)


def test_nothing_packed(spoil: Callable[[str], Path]) -> None:
    folder = spoil("gptq")
    stored = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if ".layers." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert "says that it is GPTQ, but holds no qweight" in refusal(folder)


# --- on the command line -----------------------------------------------------------------------


def test_the_command_line_says_it_once_and_writes_nothing(
    home: Path, spoil: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spoil("gptq")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    plain = saved(folder.parent / "plain")
    report = folder.parent / "out.json"
    capsys.readouterr()
    short = ["--eval-tokens", "64", "--window", "32", "--json", str(report)]
    for arguments in (
        ["evaluate", "--model", str(folder), *short],
        ["compare", "--model", str(plain), "--methods", f"bf16,checkpoint:{folder}", *short],
        ["generate", "--model", str(folder), "--prompt", "x"],
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert "model.safetensors is corrupt or truncated" in captured.err
        assert captured.out == ""
    assert not report.exists()
    assert not list(home.rglob("*")) if home.exists() else True


def test_a_variant_without_a_path_says_what_to_name() -> None:
    method = METHODS["checkpoint"]
    with pytest.raises(ConfigError, match="name a folder of quantized weights"):
        method.check(configure(parse_variant("checkpoint")))
