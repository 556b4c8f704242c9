"""Mixed precision: rules by hand, allocation, its figures, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab import sensitivity
from quantlab.blockwise import quantize_blocks
from quantlab.calibration import BlockRunner
from quantlab.errors import ConfigError, MethodError
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.methods.by_width import applied_scales, fold_state, rescaled
from quantlab.methods.mixed import Plan, choose
from quantlab.methods.mixed_config import (
    PRESETS,
    WIDTHS,
    MixedConfig,
    layer_kind,
    mean_bits,
    parse_pattern,
)
from quantlab.models import apply_fold, fold_scale, locate
from quantlab.packing import AffineWeight, PackedWeight
from quantlab.plots import fragments
from quantlab.prepared import read_about
from quantlab.results import ResultRecord
from quantlab.sensitivity import Sensitivity
from quantlab.types import RunSpec, VariantSpec, ignore
from quantlab.variants import prepare_variant
from tests.records import record
from tests.tiny import GENERIC, block_of, recorded_inputs, saved, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact")

IDS = token_ids(6, 24)
MIXED = METHODS["mixed"]


def config_of(**options: Any) -> MixedConfig:
    config = configure(VariantSpec("mixed", None, tuple(sorted(options.items()))), 32)
    assert isinstance(config, MixedConfig)
    return config


def quantize(config: MixedConfig, name: str = "llama") -> dict[str, PackedWeight]:
    """Packed weights by block and path."""
    model = tiny(name)
    plan = MIXED.plan(model, IDS, config, lambda *_: None)
    packed = quantize_blocks(model, MIXED, plan, IDS, lambda *_: None)
    return {path.removeprefix(f"{model.family.blocks}."): w for path, w in packed.items()}


def widths(packed: Mapping[str, PackedWeight]) -> dict[str, int]:
    found = {}
    for name, weight in packed.items():
        assert isinstance(weight, AffineWeight)
        found[name] = weight.bits
    return found


# --- by hand -----------------------------------------------------------------------------------


def test_the_article_is_the_default_recipe() -> None:
    """Source article 001: attention 8, feed-forward 4, embeddings 16."""
    assert PRESETS["article"] == {
        "attention": 8, "feed-forward": 4, "embedding": 16, "head": 16,
    }  # fmt: skip
    for name, bits in widths(quantize(config_of())).items():
        assert bits == (8 if "self_attn" in name else 4)
    assert config_of().outer_bits() == (16, 16)
    assert config_of(preset="outer-8").outer_bits() == (8, 8)
    assert config_of(preset="outer-8", head_bits=6).outer_bits() == (8, 6)


@pytest.mark.parametrize("arithmetic", ["rtn", "gptq", "awq"])
def test_kinds_then_patterns_the_last_counts(arithmetic: str) -> None:
    config = config_of(
        arithmetic=arithmetic,
        preset="all-4",
        attention_bits=5,
        pattern="*.down_proj=8; 0.*=3; 0.self_attn.[qk]_proj=6; 1.mlp.up_proj=16",
    )
    found = widths(quantize(config))
    assert found["0.self_attn.q_proj"] == found["0.self_attn.k_proj"] == 6
    assert found["0.mlp.down_proj"] == found["0.self_attn.v_proj"] == 3
    assert found["1.mlp.down_proj"] == 8
    assert found["1.self_attn.o_proj"] == 5
    assert found["1.mlp.gate_proj"] == 4
    assert "1.mlp.up_proj" not in found, "16 leaves a linear alone"
    assert MIXED.weight_bits(config) == 3


@pytest.mark.parametrize("name", ["gpt2", "opt", "neox", "phi3", GENERIC])
def test_kinds_of_other_families(name: str) -> None:
    block = block_of(tiny(name))
    kinds = {path: layer_kind(kind) for path, kind in block.kinds.items()}
    attention = {path for path, kind in kinds.items() if kind == "attention"}
    assert attention == {path for path in kinds if "attn" in path or "attention" in path}
    assert 0 < len(attention) < len(kinds)


@pytest.mark.parametrize("arithmetic", ["rtn", "gptq", "awq"])
def test_one_width_everywhere_is_the_other_method(
    arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 4 bits for all, the same bytes as the method whose arithmetic it is, on statistics of
    whole blocks behind quantized ones: mixed precision does not go through a block input by input,
    and does not leave the error out."""
    monkeypatch.setattr(type(METHODS[arithmetic]), "sequential", False)
    monkeypatch.setattr(type(METHODS[arithmetic]), "sees_error", True)
    model = tiny("llama")
    plain = quantize_blocks(
        model, METHODS[arithmetic], configure(VariantSpec(arithmetic, 4), 32), IDS, lambda *_: None
    )
    mixed = quantize(config_of(arithmetic=arithmetic, preset="all-4"))
    for name, weight in mixed.items():
        for part, tensor in weight.tensors().items():
            assert torch.equal(tensor, plain[f"model.layers.{name}"].tensors()[part]), name


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_scales_of_folds_are_recovered(name: str) -> None:
    model = tiny(name)
    block = block_of(model)
    before, wanted = fold_state(block), {}
    for seed, fold in enumerate(block.folds):
        columns = block.linears[fold.targets[0]].weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        scale = fold_scale(block, fold, torch.rand(columns, generator=generator) + 0.5)
        apply_fold(block, fold, scale)
        wanted.update(dict.fromkeys(fold.targets, scale))
    found = applied_scales(block, before)
    assert found.keys() == wanted.keys()
    for path, scale in wanted.items():
        torch.testing.assert_close(found[path], scale, rtol=1e-4, atol=0)


def test_statistics_follow_the_scales() -> None:
    """Of x / s, recomputed from the inputs; what shared an input still does, what did not stays."""
    model = tiny("llama")
    stats = BlockRunner(model, IDS).collect(block_of(model), MIXED.needs)
    scale = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5
    q, k, o = (f"self_attn.{name}_proj" for name in "qko")
    found = rescaled(stats, {q: scale, k: scale})
    with recorded_inputs(model.family, model.module) as seen:
        model.module(IDS, use_cache=False)
    x = torch.cat(seen[f"{model.family.blocks}.0.{q}"]) / scale
    moment, mean = found[q].second_moment, found[q].mean_abs
    assert moment is not None
    assert mean is not None
    torch.testing.assert_close(moment.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean.double(), x.abs().mean(0), rtol=1e-4, atol=1e-6)
    assert found[q] is found[k]
    assert found[o] is stats[o]


def test_awq_rounds_other_widths_for_the_scaled_inputs() -> None:
    """Where folds have moved scales into a linear, its 8-bit neighbours keep their function: the
    outputs of the whole block stay near the original's."""
    model, config = tiny("llama"), config_of(arithmetic="awq", pattern="*.[qk]_proj=8;*.v_proj=3")
    block = block_of(model)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    original = {path: m.weight.detach().clone() for path, m in block.linears.items()}
    norm = block.module.input_layernorm.weight.clone()
    stats = BlockRunner(model, IDS).collect(block, MIXED.needs)
    packed = MIXED.quantize_block(block, stats, config)
    scale = norm / block.module.input_layernorm.weight
    assert not torch.allclose(scale, torch.ones_like(scale)), "awq found something to scale"
    for path, limit in (("self_attn.q_proj", 0.02), ("self_attn.k_proj", 0.02)):
        got = (x / scale) @ packed[path].dequantize().T
        wanted = x @ original[path].T
        assert float((got - wanted).norm() / wanted.norm()) < limit


# --- allocation --------------------------------------------------------------------------------


def budgeted(budget: float, folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Plan:
    monkeypatch.setenv("QUANTLAB_HOME", str(folder))
    config = config_of(arithmetic="rtn", budget=budget, sensitivity_tokens=96, **more)
    plan = MIXED.plan(tiny("llama"), IDS, config, lambda *_: None)
    assert isinstance(plan, Plan)
    return plan


def test_a_second_budget_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = budgeted(5.0, tmp_path, monkeypatch)
    monkeypatch.setattr(sensitivity, "measure", None)
    second = budgeted(6.5, tmp_path, monkeypatch)
    assert first.table == second.table
    assert first.predicted_bits <= 5.0 < second.predicted_bits <= 6.5
    assert first.predicted_kl is not None
    assert second.predicted_kl is not None
    assert second.predicted_kl < first.predicted_kl
    assert set(first.bits.values()) <= set(WIDTHS)
    with pytest.raises(TypeError):
        budgeted(5.0, tmp_path, monkeypatch, group_size=16)


def test_sensitive_linears_get_the_bits() -> None:
    """Ten of equal size, one a thousand times as sensitive: it gets the most."""
    errors = {bits: 4.0**-bits for bits in (2, *WIDTHS)}
    table = [Sensitivity(f"{i}.a", "attn_q", 64, 64, 1e-3 if i else 1.0, errors) for i in range(10)]
    config = config_of(arithmetic="rtn", budget=4.9)
    bits = choose(table, config)
    assert bits["0.a"] == 8
    assert max(bits[f"{i}.a"] for i in range(1, 10)) <= 5
    shapes = {one.name: (one.rows, one.columns) for one in table}
    assert mean_bits(shapes, bits, config) <= 4.9


def test_predicted_bits_are_the_measured_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the pipeline's own preparation: exact, and kept with the artifact."""
    monkeypatch.setenv("QUANTLAB_HOME", str(tmp_path / "home"))
    source = locate(str(saved(tmp_path / "model")))
    for text in ("mixed:arithmetic=rtn:budget=5:sensitivity_tokens=96", "mixed:pattern=0.*=16"):
        variant, folder = parse_variant(text), tmp_path / str(len(text))
        spec = RunSpec(group_size=24)  # ragged last groups
        prepared = prepare_variant(variant, source, IDS, folder, spec, ignore)
        found = prepared.details["allocation"]
        assert found["predicted_bits_per_weight"] == found["measured_bits_per_weight"]
        assert len(found["bits"]) == 14
        again = read_about(folder)
        assert again is not None
        assert again.details == prepared.details
        if found["budget"]:
            assert found["measured_bits_per_weight"] <= 5
            assert found["tokens"] == 96
            assert len(found["sensitivities"]) == 14
            # Predicted by a sum of single changes, measured together.
            ratio = found["predicted_kl_divergence"] / found["measured_kl_divergence"]
            assert 1 / 3 < ratio < 3


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "*.down_proj"}, r"pattern=\*.down_proj: needs NAME=BITS"),
        ({"pattern": "*.a=8,*.b=4"}, "separated by semicolons"),
        ({"pattern": "=8"}, "needs NAME=BITS"),
        ({"pattern": "0.*=9"}, "needs 2 to 8 bits, or 16"),
        ({"pattern": "0.*=0"}, "needs 2 to 8 bits, or 16"),
        ({"pattern": "0.*=four"}, "needs 2 to 8 bits, or 16"),
        ({"budget": 1.5}, "budget=1.5: needs more than 2"),
        ({"budget": 4.5, "pattern": "0.*=8"}, "leave pattern, attention_bits"),
        ({"budget": 4.5, "attention_bits": 8}, "or set budget=0"),
        ({"preset": "recipe"}, "preset=recipe: choose one of article"),
        ({"attention_bits": 9}, "attention_bits=9: choose one of"),
        ({"arithmetic": "gguf"}, "arithmetic=gguf: choose one of gptq, awq, rtn"),
    ],
)
def test_bad_settings_are_refused_before_any_work(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(**options)


def test_what_does_not_fit_the_model_is_refused_at_plan_time() -> None:
    def plan(ids: Any = IDS, **options: Any) -> None:
        MIXED.plan(tiny("llama"), ids, config_of(**options), lambda *_: None)

    with pytest.raises(ConfigError, match=r"pattern=\*.fc1: no linear .* like 0.self_attn.q_proj"):
        plan(pattern="*.down_proj=8;*.fc1=4")
    with pytest.raises(
        ConfigError, match=r"budget=2.1: the least possible with group_size=32 is 2"
    ):
        plan(budget=2.1)
    with pytest.raises(MethodError, match="needs calibration text"):
        plan(None, budget=5.0)
    model = tiny("llama")
    with pytest.raises(MethodError, match="needs the plan of the whole model"):
        MIXED.quantize_block(block_of(model), {}, config_of(budget=5.0))


def test_patterns_are_read_as_written() -> None:
    assert parse_pattern(" *.down_proj = 8 ;; 0.*=16;") == [("*.down_proj", 8), ("0.*", 16)]
    label = "mixed:pattern=*.down_proj=8;0.*=16"
    assert parse_variant(label).label == label


def test_the_page_shows_predicted_and_measured() -> None:
    details = {
        "allocation": {
            "budget": 4.5,
            "predicted_bits_per_weight": 4.4995,
            "measured_bits_per_weight": 4.4995,
            "bits": {"0.a": 4, "0.b": 8, "0.c": 4},
            "predicted_kl_divergence": 0.181,
            "measured_kl_divergence": 0.155,
            "tokens": 1024,
            "measured_at_bits": 3,
            "sensitivities": [],
        }
    }
    one = record("mixed:4", details=details)
    assert ResultRecord.from_json(json.loads(json.dumps(one.to_json()))) == one
    old = {key: value for key, value in one.to_json().items() if key != "details"}
    assert ResultRecord.from_json(old).details == {}
    for language in ("en", "ja"):
        html = fragments.results_table([one], language=language)
        for text in ("4.4995 / 4.4995", "0.181 / 0.155", "1,024"):
            assert text in html
    assert "4 bits: 2, 8 bits: 1" in fragments.results_table([one], language="en")
    assert "0.181" not in fragments.results_table([record("rtn:4")])
