"""bitsandbytes' files: bytes by hand, round trips, and what is damaged."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.blockwise import quantize_blocks
from quantlab.codebook import BLOCK_SIZES, CODEBOOKS, CodebookName, codebook
from quantlab.errors import ConfigError, ModelError
from quantlab.export import checkpoint, checkpoint_reader
from quantlab.export.base import Layer, Linear, Stored, check_fields
from quantlab.export.formats import FORMATS
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.methods.llm_int8 import round_rows
from quantlab.models.quantization import Quantization, Scheme, quantization_of
from quantlab.packing import CodebookWeight, OutlierWeight, PackedWeight, codebook_weight, describe
from tests.tiny import random, tiny

FORMAT = FORMATS["bitsandbytes"]
PATH = "model.layers.0.mlp.up_proj"
DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32"}


def decoded(tensors: dict[str, Tensor], shape: tuple[int, int], bits: int) -> PackedWeight:
    stored = {name: Stored(DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    scheme = Scheme(bits, None, True)
    fields = FORMAT.fields(scheme, Linear("layer", shape, stored))
    check_fields("layer", fields, stored)
    layer = Layer(scheme, shape, tuple(fields), bias=False)
    return FORMAT.decode(Quantization("bitsandbytes", (scheme,)), layer, tensors)


def same(first: PackedWeight, second: PackedWeight) -> None:
    assert describe(first) == describe(second)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


def text(state: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def test_bytes_by_hand() -> None:
    """One row of four values in a block: codes 15, 0, 7, 8 of NF4, times 2."""
    values = struct.unpack("<16f", b"".join(struct.pack("<f", v) for v in codebook("nf4").tolist()))
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [1, 4]}
    weight = decoded(
        {
            "weight": torch.tensor([[0xF0], [0x78]], dtype=torch.uint8),
            "weight.absmax": torch.tensor([2.0]),
            "weight.quant_map": torch.tensor(values),
            "weight.quant_state.bitsandbytes__nf4": text(state),
        },
        (1, 4),
        4,
    )
    expected = [2.0, -2.0, 0.0, 2 * 0.07958029955625534]  # table 2 of QLoRA
    assert weight.dequantize().tolist()[0] == pytest.approx(expected, abs=1e-6)
    # LLM.int8(): row maxima 12.7 and 1.27 make steps of 0.1 and 0.01.
    rows = decoded(
        {
            "weight": torch.tensor([[127, -3], [100, -127]], dtype=torch.int8),
            "SCB": torch.tensor([12.7, 1.27]),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        },
        (2, 2),
        8,
    )
    assert rows.dequantize().flatten().tolist() == pytest.approx([12.7, -0.3, 1.0, -1.27], rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 150),
    name=st.sampled_from(CODEBOOKS),
    block=st.sampled_from(BLOCK_SIZES),
    double=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_tables_come_back(
    rows: int, columns: int, name: CodebookName, block: int, double: bool, seed: int
) -> None:
    weight = codebook_weight(random(rows, columns, seed=seed), name, block, double_quant=double)
    fields = FORMAT.encode(weight)
    found = decoded(fields, (rows, columns), 4)
    # Where two block sizes make the same number of blocks, the state says which it is.
    same(weight, found)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 9),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**16),
)
def test_rows_of_int8_come_back(rows: int, columns: int, exponent: int, seed: int) -> None:
    """Every float32 that is a maximum divided by 127 is found again, and no other is written."""
    weight = round_rows(random(rows, columns, seed=seed) * 2.0**exponent, 6.0)
    same(weight, decoded(FORMAT.encode(weight), (rows, columns), 8))


def test_a_scale_that_no_maximum_has_is_refused() -> None:
    """127 s rounds to steps of 2^-16 here, of which 127 parts are more than a step of s."""
    scales = 1.5 + torch.arange(4096) * 2.0**-23
    reachable = (127 * 1.5 + torch.arange(-9, 40_000) * 2.0**-16) / 127
    odd = scales[~torch.isin(scales, reachable)]
    assert 0 < odd.numel() < 100
    weight = OutlierWeight(torch.ones(odd.numel(), 1, dtype=torch.int8), odd)
    with pytest.raises(ConfigError, match="max"):
        FORMAT.encode(weight)


# --- folders -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sound")
    for name, variant in (
        ("double", "nf4"),
        ("plain", "fp4:double_quant=false"),
        ("int8", "llm_int8"),
    ):
        model, spec = tiny(blocks=1), parse_variant(variant)
        packed = quantize_blocks(
            model, METHODS[spec.method], configure(spec), None, lambda *_: None
        )
        checkpoint.write(home / name, "bitsandbytes", model, packed)
    return home


@pytest.fixture
def spoil(sound: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(sound / name, tmp_path / "spoilt")


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        checkpoint_reader.read(folder)
    message = str(caught.value)
    assert message.startswith("model: ")
    assert "\n" not in message
    assert len(message) < 500
    return message


def change(folder: Path, field: str, tensor: Tensor | None) -> None:
    """Replace (or, with None, remove) a field of `PATH`."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    del stored[f"{PATH}.{field}"]
    if tensor is not None:
        stored[f"{PATH}.{field}"] = tensor.contiguous()
    save_file(stored, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["double", "plain", "int8"])
def test_missing_misshapen_and_mistyped_tensors(name: str, sound: Path, tmp_path: Path) -> None:
    stored = load_file(sound / name / "model.safetensors")
    fields = {key[len(PATH) + 1 :]: t for key, t in stored.items() if key.startswith(PATH)}
    assert len(fields) == {"double": 6, "plain": 4, "int8": 3}[name]
    for number, (field, whole) in enumerate(sorted(fields.items())):
        folder = shutil.copytree(sound / name, tmp_path / f"m{number}" / "m")
        change(folder, field, whole.to(torch.float64))
        assert PATH in refusal(folder)
        if whole.dim() and "quant_state" not in field:
            change(folder, field, whole[:-1])
            assert PATH in refusal(folder)
        if field != "weight_format":
            change(folder, field, None)
            refusal(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize(
    ("name", "field"),
    [("plain", "weight.absmax"), ("double", "weight.nested_absmax"), ("int8", "SCB")],
)
def test_scales_that_are_none(
    name: str, field: str, bad: float, spoil: Callable[[str], Path]
) -> None:
    folder = spoil(name)
    scales = load_file(folder / "model.safetensors")[f"{PATH}.{field}"]
    scales[0] = bad
    change(folder, field, scales)
    assert ("negative" if bad == -1 else "not finite") in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_type": "fp4"}, "quant_state says fp4"),
        ({"shape": [64, 96]}, "shape [64, 96]"),
        ({"shape": 3}, "cannot be read"),
        ({"blocksize": 63}, "blocks of 63"),
        ({"blocksize": 32}, "absmax"),
        ({"nested_blocksize": 128}, "quant_state says"),
        ({"nested_offset": float("inf")}, "offset that is not finite"),
        ({"nested_offset": "x"}, "cannot be read"),
        ({"quant_type": None}, "quant_state says"),
    ],
)
def test_a_state_that_lies(
    changes: dict[str, Any], words: str, spoil: Callable[[str], Path]
) -> None:
    folder = spoil("double")
    field = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(load_file(folder / "model.safetensors")[f"{PATH}.{field}"].tolist()))
    change(folder, field, text(state | changes))
    message = refusal(folder)
    assert words in message
    assert PATH in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b" " * 5000])
def test_a_state_that_is_none(content: bytes, spoil: Callable[[str], Path]) -> None:
    folder = spoil("double")
    field = "weight.quant_state.bitsandbytes__nf4"
    change(folder, field, torch.tensor(list(content), dtype=torch.uint8))
    assert PATH in refusal(folder)


@pytest.mark.parametrize("field", ["weight.quant_map", "weight.nested_quant_map"])
def test_another_table(field: str, spoil: Callable[[str], Path]) -> None:
    folder = spoil("double")
    table = load_file(folder / "model.safetensors")[f"{PATH}.{field}"]
    table[3] += 1e-4
    change(folder, field, table)
    assert f"its {field.partition('.')[2]} is another table" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load_in_4bit": False}, "neither or both"),
        ({"load_in_8bit": True}, "neither or both"),
        ({"load_in_4bit": "yes"}, "neither true nor false"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "keeps its codes in 'bfloat16'"),
        ({"llm_int8_has_fp16_weight": True}, "not quantized"),
        ({"llm_int8_threshold": -1}, "is no magnitude"),
        ({"llm_int8_threshold": True}, "is no magnitude"),
    ],
)
def test_settings_that_are_not_read(
    changes: dict[str, Any], words: str, spoil: Callable[[str], Path]
) -> None:
    folder = spoil("double")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    assert words in refusal(folder)


def test_thresholds_are_kept(sound: Path, tmp_path: Path) -> None:
    model, spec = tiny(blocks=1), parse_variant("llm_int8:8:threshold=4.5")
    packed = quantize_blocks(model, METHODS["llm_int8"], configure(spec), None, lambda *_: None)
    folder = checkpoint.write(tmp_path / "m", "bitsandbytes", model, packed)
    said = quantization_of(folder)
    assert said is not None
    assert (said.threshold, said.activation_bits, said.bits) == (4.5, 8, 8)
    again, _ = checkpoint_reader.read(folder)
    weight = again.module.get_submodule(PATH).weight_packed
    assert isinstance(weight, OutlierWeight)
    assert weight.threshold == 4.5


def test_linears_that_differ_are_refused(tmp_path: Path) -> None:
    model, spec = tiny(blocks=1), parse_variant("nf4")
    packed = quantize_blocks(model, METHODS["nf4"], configure(spec), None, lambda *_: None)
    weight = packed[PATH]
    assert isinstance(weight, CodebookWeight)
    other = codebook_weight(weight.dequantize(), "fp4", 64, double_quant=True)
    with pytest.raises(ConfigError, match="keep all linears alike"):
        checkpoint.write(tmp_path / "m", "bitsandbytes", model, {**packed, PATH: other})
    assert not (tmp_path / "m").exists()
