"""Names, options and variants of every method: what they tell of themselves, and refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from quantlab.errors import ConfigError
from quantlab.methods import METHODS, configure, parse_variant, parse_variants
from quantlab.types import VariantSpec

W8A8 = ("smoothquant", "dynamic_int8", "static_int8", "onnx_int8")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_describes_itself(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.title
    assert method.summary.endswith(".")
    assert bool(method.paper) == method.quantizes
    config = configure(parse_variant(name))
    assert dataclasses.is_dataclass(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 3
    for field in dataclasses.fields(config):
        meta = field.metadata
        assert meta["label"]
        assert meta["help"].endswith(".")
        value = getattr(config, field.name)
        assert meta["choices"] is None or value in meta["choices"]
        low, high = meta["minimum"], meta["maximum"]
        assert low is None or low <= value <= high
        if isinstance(value, float):
            assert meta["step"], "a slider needs a step"
    assert config.to_json().keys() == {field.name for field in dataclasses.fields(config)}
    for bits in method.bits:
        assert method.weight_bits(configure(VariantSpec(name, bits))) == bits
    eight = name in W8A8 or name == "llm_int8"
    assert method.activation_bits(config) == (8 if eight else config_bits(name))


def config_bits(name: str) -> int:
    return 32 if name == "fp32" else 16


def wrong_values() -> list[Any]:
    """Every option of every method with every kind of value that it must refuse."""
    found = []
    for name in METHODS:
        for field in dataclasses.fields(METHODS[name].Config):
            if field.name == "bits":
                continue
            meta, kind = field.metadata, type(field.default)
            values: list[Any] = {
                int: [0.5, True, "many", "", None, -(10**9), 10**9, "1.5"],
                float: ["much", True, None, float("nan"), float("inf"), "nan", "-inf", -1e9, 1e9],
                bool: [0, 1, "yes", "", None, 1.0],
                str: [True, 3, None],
            }[kind]
            if meta["choices"] is not None:
                values = [*values, "no-such-choice", ""]
            if meta["minimum"] is not None:
                values = [*values, kind(meta["minimum"] - 1), kind(meta["maximum"] + 1)]
            found += [
                pytest.param(name, field.name, v, id=f"{name}-{field.name}-{v}") for v in values
            ]
    return found


@pytest.mark.parametrize(("name", "key", "value"), wrong_values())
def test_wrong_values_are_refused_by_name(name: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(VariantSpec(name, None, ((key, value),)))
    message = str(caught.value)
    assert message.startswith(f"{name}:")
    assert f"{key}=" in message
    assert "needs" in message or "choose" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", METHODS)
def test_unknown_options_and_bits_are_refused(name: str) -> None:
    method = METHODS[name]
    for key in ("no_such_option", "bits", "", "Config", "validate"):
        with pytest.raises(ConfigError, match=f"unknown option {key}; {name} has"):
            configure(VariantSpec(name, None, ((key, 4),)))
    for bits in {0, 1, 9, 16, -4} - set(method.bits):
        with pytest.raises(ConfigError, match=f"{name} has no"):
            configure(VariantSpec(name, bits))
    if method.bits:
        with pytest.raises(ConfigError) as caught:
            configure(VariantSpec(name, 99))
        assert all(str(bits) in str(caught.value) for bits in method.bits)


@pytest.mark.parametrize("name", METHODS)
def test_values_may_come_as_text(name: str) -> None:
    """As the command line gives them."""
    default = configure(VariantSpec(name))
    options = tuple(
        (key, str(value).lower() if isinstance(value, bool) else str(value))
        for key, value in default.to_json().items()
        if key != "bits"
    )
    assert configure(VariantSpec(name, None, options)) == default


def test_the_group_size_of_the_run_is_overridden_by_the_variant() -> None:
    for name in ("rtn", "gptq", "awq"):
        assert configure(VariantSpec(name)).group_size == 64
        assert configure(VariantSpec(name), 128).group_size == 128
        own = VariantSpec(name, None, (("group_size", 32),))
        assert configure(own, 128).group_size == 32
        for wrong in (0, -64, 4):
            with pytest.raises(ConfigError, match=f"group_size={wrong}: needs at least 8"):
                configure(VariantSpec(name), wrong)
    configure(VariantSpec("smoothquant"), 128)
    configure(VariantSpec("bf16"), 128)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("bf16", "bf16"),
        (" gptq : 4 ", "gptq:4"),
        ("gptq:4:group_size=128:act_order=false", "gptq:4:act_order=false:group_size=128"),
        ("rtn:8:clip=true", "rtn:8:clip=true"),
        ("smoothquant", "smoothquant"),
        ("gguf:q4_0", "gguf:q4_0"),
    ],
)
def test_variants_are_read_as_they_are_written(text: str, label: str) -> None:
    spec = parse_variant(text)
    assert spec.label == label
    assert parse_variant(spec.label) == spec
    assert configure(parse_variant(label)) == configure(VariantSpec.from_json(spec.to_json()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "unknown method ''"),
        ("gtpq:4", "unknown method 'gtpq'; choose"),
        ("gptq:four", "expected METHOD:BITS or key=value, got 'four'"),
        ("gptq:²", "expected METHOD:BITS"),
        ("gptq:4:8", "got '8'"),
        ("gptq:-4", "got '-4'"),
        ("gptq:5", "gptq has no 5 bits; choose 4, 2, 3, 8"),
        ("bf16:16", "bf16 has no bits to choose"),
        ("rtn:4:=1", "unknown option"),
        ("rtn:4:clip=maybe", "clip=maybe: needs true or false"),
    ],
)
def test_malformed_variants_name_the_wrong_part(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_variant(text)
    assert words in str(caught.value)


def test_lists_of_variants() -> None:
    labels = [spec.label for spec in parse_variants(" bf16, rtn:4 ,,gguf:q8_0")]
    assert labels == ["bf16", "rtn:4", "gguf:q8_0"]
    with pytest.raises(ConfigError, match="rtn:4 is named twice"):
        parse_variants("rtn:4,bf16,rtn:4")
    for empty in ("", " , "):
        with pytest.raises(ConfigError, match="name at least one"):
            parse_variants(empty)
    with pytest.raises(ConfigError, match="unknown method 'nothing'"):
        configure(VariantSpec("nothing"))
