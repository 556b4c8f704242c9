"""Static INT8: each observer's grid from the recorded inputs by numpy, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quantlab.calibration import ActStats
from quantlab.errors import ConfigError, MethodError
from quantlab.layers import QuantLinear
from quantlab.methods import METHODS, parse_variant
from quantlab.methods.static_int8 import StaticInt8Config
from quantlab.models import LoadedModel
from quantlab.observers import count_values
from quantlab.packing import AffineWeight
from tests.methods.planted import inputs, planted, statistics
from tests.tiny import FIRST_CLASS, block_of, lone_block

pytestmark = pytest.mark.usefixtures("exact")


def quantize(model: LoadedModel, config: StaticInt8Config) -> dict[str, AffineWeight]:
    packed = METHODS["static_int8"].quantize_block(
        block_of(model), statistics(model, "static_int8"), config
    )
    assert all(isinstance(weight, AffineWeight) for weight in packed.values())
    return packed  # type: ignore[return-value]


def grid_of(low: float, high: float) -> tuple[float, int]:
    low, high = min(low, 0.0), max(high, 0.0)
    return (high - low) / 255, round(-low / ((high - low) / 255))


def error_of(x: np.ndarray, step: float, zero: int) -> float:
    codes = np.clip(np.round(x / step) + zero, 0, 255)
    return float((((codes - zero) * step - x) ** 2).sum())


@pytest.mark.parametrize("name", FIRST_CLASS)
def test_every_input_s_grid_is_what_its_observer_says(name: str) -> None:
    model = planted(name)
    seen = {path: x.numpy() for path, x in inputs(model).items()}
    configs = {
        "minmax": StaticInt8Config(),
        "percentile": StaticInt8Config(observer="percentile", percentile=99.0),
        "mse": StaticInt8Config(observer="mse"),
    }
    grids = {key: quantize(model, config) for key, config in configs.items()}
    for path, x in seen.items():
        found = {}
        for key, packed in grids.items():
            activation = packed[path].activation
            assert activation is not None
            assert activation.kind == "tensor"
            found[key] = (activation.scale, activation.zero)
        tails = np.percentile(x, [0.5, 99.5], method="inverted_cdf")
        for key, ends in (("minmax", (x.min(), x.max())), ("percentile", tails)):
            step, zero = grid_of(*map(float, ends))
            # Counted after rounding to bfloat16.
            assert found[key][0] == pytest.approx(step, rel=1e-4 if key == "minmax" else 2**-7)
            assert abs(found[key][1] - zero) <= 1
        errors = {key: error_of(x, *grid) for key, grid in found.items()}
        # Its own measure, up to the grid of thresholds and the rounding of what was counted.
        assert errors["mse"] <= 1.02 * min(errors["minmax"], errors["percentile"])
        assert grid_steps(found)


def grid_steps(found: dict[str, tuple[float, int]]) -> bool:
    """Clipping makes finer steps, never coarser ones."""
    return all(found[key][0] <= found["minmax"][0] * (1 + 2**-8) for key in found)


def test_weights_are_rounded_a_row_to_absmax_as_in_smoothquant() -> None:
    model = planted("llama")
    for path, weight in quantize(model, StaticInt8Config()).items():
        original = block_of(model).linears[path].weight.double()
        steps = original.abs().amax(1, keepdim=True) / 127
        codes, scales, zeros = weight.unpacked()
        assert weight.zeros is None
        assert set(zeros.flatten().tolist()) == {128.0}
        torch.testing.assert_close(scales.double(), steps, rtol=1e-6, atol=0)
        differing = codes.long() - 128 != torch.round(original / steps).long()
        assert float(differing.double().mean()) < 1e-3
    naive = METHODS["smoothquant"].quantize_block(
        block_of(model),
        statistics(model, "smoothquant"),
        METHODS["smoothquant"].Config(alpha=-1.0, search=False),  # type: ignore[call-arg]
    )
    ours = quantize(model, StaticInt8Config())
    for path, weight in naive.items():
        assert isinstance(weight, AffineWeight)
        assert torch.equal(weight.codes, ours[path].codes)
        assert weight.activation == ours[path].activation


def test_one_massive_activation_and_what_each_observer_makes_of_it() -> None:
    """As in the bundled model: the first token puts one channel of down's input far above
    everything else. minmax and mse keep it, and every other token is rounded away; percentile
    keeps the others and gives that token up; a grid a token (dynamic) loses neither."""
    model = planted("llama")
    path = "mlp.down_proj"
    x, weight = inputs(model)[path].float(), block_of(model).linears[path].weight
    x[0, 5] = 400 * x.abs().max()
    block = lone_block({"w": weight})
    stats = ActStats(len(x), low=x.amin(0), high=x.amax(0), histogram=count_values(x))
    want = x.double() @ weight.double().T
    others, massive = {}, {}
    for key in ("minmax", "percentile", "mse", "dynamic"):
        if key == "dynamic":
            config = METHODS["dynamic_int8"].Config(activations="token")  # type: ignore[call-arg]
            packed = METHODS["dynamic_int8"].quantize_block(block, {}, config)["w"]
        else:
            config = StaticInt8Config(observer=key, percentile=99.9)
            packed = METHODS["static_int8"].quantize_block(block, {"w": stats}, config)["w"]
        got = QuantLinear(packed, None, torch.float32)(x).double()
        off = (got - want).norm(dim=1) / want.norm(dim=1)
        others[key], massive[key] = float(off[1:].mean()), float(off[0])
    assert others["dynamic"] < 0.02
    assert others["percentile"] < 0.25
    assert min(others["minmax"], others["mse"]) > 0.5
    assert massive["percentile"] > 0.9
    assert max(massive[key] for key in ("minmax", "mse", "dynamic")) < 0.02


def test_nothing_is_folded() -> None:
    model = planted("llama")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    quantize(model, StaticInt8Config(observer="mse"))
    assert all(torch.equal(before[n], t) for n, t in model.module.state_dict().items())


def test_a_whole_percentile_is_the_whole_range() -> None:
    model = planted("llama")
    whole = quantize(model, StaticInt8Config(observer="percentile", percentile=100.0))
    for path, weight in quantize(model, StaticInt8Config()).items():
        assert weight.activation is not None
        other = whole[path].activation
        assert other is not None
        assert other.scale == pytest.approx(weight.activation.scale, rel=2**-8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_activations_that_are_not_finite_are_refused(observer: str, bad: float) -> None:
    model = planted("llama")
    stats = dict(statistics(model, "static_int8"))
    spoilt = stats["mlp.down_proj"].max_abs.clone()
    spoilt[4] = bad
    stats["mlp.down_proj"] = replace(stats["mlp.down_proj"], high=spoilt)
    with pytest.raises(MethodError, match=r"mlp\.down_proj are not finite"):
        METHODS["static_int8"].quantize_block(
            block_of(model), stats, StaticInt8Config(observer=observer)
        )


def test_wrong_options_are_refused() -> None:
    for text, words in (
        ("static_int8:4", "has no 4 bits"),
        ("static_int8:8:observer=entropy", "choose one of minmax, percentile, mse"),
        ("static_int8:8:percentile=101", "at most 100"),
        ("static_int8:8:percentile=50", "at least 99"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_variant(text)
