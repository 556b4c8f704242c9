"""Sensitivities against the slow way: quantize one linear, run the whole model, compare."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch.nn import functional as F

from quantlab import sensitivity
from quantlab.calibration import ActStats
from quantlab.errors import MethodError
from quantlab.methods import METHODS, configure
from quantlab.models import Block, LoadedModel
from quantlab.packing import PackedWeight
from quantlab.sensitivity import MEASURED_BITS, STRIDE, Probe, Sensitivity, measure, pieces
from quantlab.types import VariantSpec
from tests.tiny import FAMILIES, block_of, logits, recorded_inputs, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact")

IDS = token_ids(3, 24)
WIDTHS = (2, 3, 4, 8)


def rounded(block: Block, stats: Mapping[str, ActStats], bits: int) -> PackedWeight:
    config = configure(VariantSpec("rtn", bits), 32)
    (weight,) = METHODS["rtn"].quantize_block(block, stats, config).values()
    return weight


def sensitivities(model: LoadedModel) -> list[Sensitivity]:
    return measure(model, IDS, IDS.numel(), WIDTHS, (), rounded, lambda *_: None)


def slow_divergence(original: LoadedModel, changed: LoadedModel) -> float:
    """Mean KL divergence over every STRIDE-th position, by whole passes in float64."""
    p = F.log_softmax(logits(original.module, IDS), -1)[:, ::STRIDE]
    q = F.log_softmax(logits(changed.module, IDS), -1)[:, ::STRIDE]
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_one_linear_alone_costs_what_the_slow_way_says(name: str) -> None:
    model = tiny(name)
    before = copy.deepcopy(model.module.state_dict())
    table = sensitivities(model)
    assert all(torch.equal(before[key], now) for key, now in model.module.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.module.modules())
    assert [one.name for one in table] == [
        f"{index}.{path}" for index in range(2) for path in block_of(model, index).linears
    ]
    for one in table:
        number, _, path = one.name.partition(".")
        changed = tiny(name)
        block = block_of(changed, int(number))
        weight = block.linears[path].weight
        part = sensitivity.alone(block, path)
        with torch.no_grad():
            weight.copy_(rounded(part, {}, MEASURED_BITS).dequantize())
        # The floor of bfloat16 is taken off; in exact arithmetic it is next to nothing.
        assert one.measured == pytest.approx(slow_divergence(model, changed), rel=0.01, abs=2e-6)
        assert (one.rows, one.columns, one.kind) == (*weight.shape, block.kinds[path])


def test_other_widths_follow_from_the_output_error() -> None:
    """e(b) from the recorded inputs themselves, and KL(b) from it; the real KL is near for small
    changes: within a factor of two here, where a bit is a factor of four."""
    model = tiny("llama", seed=2)
    table = {one.name: one for one in sensitivities(model)}
    with recorded_inputs(model.family, model.module) as seen:
        model.module(IDS, use_cache=False)
    for name in ("0.mlp.down_proj", "1.self_attn.v_proj", "1.mlp.gate_proj"):
        one, (number, _, path) = table[name], name.partition(".")
        x = torch.cat(seen[f"{model.family.blocks}.{name}"])
        block = block_of(model, int(number))
        original = block.linears[path].weight.detach().double()
        part = sensitivity.alone(block, path)
        for bits in WIDTHS:
            dense = rounded(part, {}, bits).dequantize()
            error = ((x @ (dense - original).T).square().sum()) / (x @ original.T).square().sum()
            assert one.errors[bits] == pytest.approx(float(error), rel=1e-3)
            scaled = one.measured * one.errors[bits] / one.errors[MEASURED_BITS]
            assert one.at(bits) == pytest.approx(scaled)
        changed = tiny("llama", seed=2)
        with torch.no_grad():
            weight = block_of(changed, int(number)).linears[path].weight
            weight.copy_(rounded(part, {}, 4).dequantize())
        slow = slow_divergence(model, changed)
        assert slow / 2 < one.at(4) < slow * 2


def test_blocks_before_a_change_need_not_run() -> None:
    model = tiny("llama")
    probe = Probe(model, IDS)
    assert probe.divergence(0) == 0.0
    with torch.no_grad():
        block_of(model, 1).linears["mlp.up_proj"].weight.mul_(1.5)
    whole = probe.divergence(0)
    assert whole > 1e-4
    assert probe.divergence(1) == pytest.approx(whole, rel=1e-5)
    with torch.no_grad():
        block_of(model, 0).linears["mlp.up_proj"].weight.mul_(1.5)
    assert probe.divergence(1) == pytest.approx(whole, rel=1e-5), "block 0 does not run"
    assert probe.divergence(0) > 1.1 * whole


def test_pieces_are_spread_and_short() -> None:
    ids = torch.arange(6 * 100).reshape(6, 100)
    cut = pieces(ids, 120, 40)
    assert cut.shape == (3, 40)
    assert cut[:, 0].tolist() == [0, 200, 400]
    assert pieces(ids, 10_000, 256).shape == (6, 100)
    assert pieces(ids, 10, 256).shape == (1, 10)


def test_tables_are_kept_and_damage_is_measured_anew(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTLAB_HOME", str(tmp_path))
    table = [Sensitivity("0.a", "attn_q", 4, 8, 0.5, {3: 0.1, 4: 0.02})]
    assert sensitivity.read("key") is None
    sensitivity.keep("key", table)
    assert sensitivity.read("key") == table
    path = sensitivity._file("key")
    for damaged in ('[{"name": 3}]', "[", "{}", '[{"errors": 3}]', "[5]"):
        path.write_text(damaged, encoding="utf-8")
        assert not sensitivity.read("key")


def test_a_model_that_answers_nan_is_refused() -> None:
    model = tiny("llama")

    def broken(block: Block, stats: Mapping[str, ActStats], bits: int) -> PackedWeight:
        packed = rounded(block, stats, bits)
        packed.tensors()["scales"].fill_(float("nan"))
        return packed

    with pytest.raises(MethodError, match=r"sensitivity of self_attn\.q_proj is not finite"):
        measure(model, IDS, 32, WIDTHS, (), broken, lambda *_: None)
