"""SmoothQuant against its formula in loops and int8 arithmetic spelled out, and its claim."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantlab.calibration import ActStats
from quantlab.errors import ConfigError, MethodError
from quantlab.methods import METHODS
from quantlab.methods.smoothquant import (
    ALPHAS,
    SmoothQuantConfig,
    choose_scale,
    simulated_error,
    static_range,
)
from quantlab.models import Block, Fold, LoadedModel
from quantlab.packing import Activation, AffineWeight
from tests.methods.planted import inputs, planted, statistics
from tests.tiny import FIRST_CLASS, block_of, logits, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact")

NAIVE = SmoothQuantConfig(alpha=-1.0, search=False)
FIXED = SmoothQuantConfig(alpha=0.5, search=False)


def quantize(model: LoadedModel, config: SmoothQuantConfig) -> dict[str, AffineWeight]:
    packed = METHODS["smoothquant"].quantize_block(
        block_of(model), statistics(model, "smoothquant"), config
    )
    assert all(isinstance(weight, AffineWeight) for weight in packed.values())
    return packed  # type: ignore[return-value]


# --- int8 arithmetic ---------------------------------------------------------------------------


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight codes -127 to 127 (int64) and a step for each row, float64."""
    steps = weight.double().abs().amax(1, keepdim=True) / 127
    return torch.round(weight.double() / steps).long(), steps[:, 0]


def round_inputs(x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Input codes less their zero (int64), and the step of each token, float64."""
    x = x.double()
    if activation.kind == "token":
        steps = x.abs().amax(1) / 127
        return torch.round(x / steps[:, None]).clamp(-128, 127).long(), steps
    codes = (torch.round(x / activation.scale) + activation.zero).clamp(0, 255)
    return (codes - activation.zero).long(), torch.full((len(x),), activation.scale).double()


def int8_product(x: Tensor, codes: Tensor, steps: Tensor, activation: Activation) -> Tensor:
    """Whole numbers are multiplied and added; only the sums are scaled."""
    x_codes, x_steps = round_inputs(x, activation)
    return (x_codes @ codes.T).double() * x_steps[:, None] * steps


def int8_linear(x: Tensor, packed: AffineWeight) -> Tensor:
    codes, steps, zeros = packed.unpacked()
    assert packed.activation is not None
    return int8_product(x, (codes.long() - zeros.long()), steps[:, 0].double(), packed.activation)


def errors_of(model: LoadedModel, config: SmoothQuantConfig) -> dict[str, float]:
    """Output error of every linear of the first block relative to its output, int8 throughout.

    Rows are compared in the original's units: a folded linear's output may be scaled."""
    block, before = block_of(model), inputs(model)
    originally = {path: before[path] @ m.weight.double().T for path, m in block.linears.items()}
    packed = quantize(model, config)
    seen, found = inputs(model), {}
    for path, weight in packed.items():
        folded = seen[path] @ block.linears[path].weight.double().T
        units = originally[path].norm(dim=0) / folded.norm(dim=0)
        difference = (int8_linear(seen[path], weight) - folded) * units
        found[path] = float(difference.square().sum() / originally[path].square().sum())
    return found


# --- the formula -------------------------------------------------------------------------------


def scale_by_hand(block: Block, fold: Fold, x: Tensor, alpha: float) -> Tensor:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha); query heads of a group share a mean."""
    columns = x.shape[1]
    scale = torch.zeros(columns, dtype=torch.float64)
    for j in range(columns):
        peak = max(float(x[:, j].abs().max()), 1e-5)
        weights = [float(block.linears[t].weight[:, j].abs().max()) for t in fold.targets]
        scale[j] = peak**alpha / max(*weights, 1e-5) ** (1 - alpha)
    if fold.kind == "value":
        group = block.heads // block.kv_heads
        for kv_head, channel in itertools.product(range(block.kv_heads), range(block.head_dim)):
            at = [(kv_head * group + i) * block.head_dim + channel for i in range(group)]
            scale[at] = scale[at].log().mean().exp()
    return scale


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("name", FIRST_CLASS)
def test_the_scale_is_that_of_the_formula(name: str, alpha: float) -> None:
    model = planted(name)
    block, stats, seen = block_of(model), statistics(model, "smoothquant"), inputs(model)
    config = replace(FIXED, alpha=alpha)
    for fold in block.folds:
        found = choose_scale(block, fold, stats[fold.targets[0]], config)
        wanted = scale_by_hand(block, fold, seen[fold.targets[0]], alpha)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_search_finds_the_alpha_with_the_least_int8_error(name: str, activations: str) -> None:
    model = planted(name)
    block, stats = block_of(model), statistics(model, "smoothquant")
    config = SmoothQuantConfig(activations=activations)
    for fold in block.folds:
        stat = stats[fold.targets[0]]
        x = stat.sample
        assert x is not None
        weight = torch.cat([block.linears[target].weight for target in fold.targets])
        tried = [torch.ones(x.shape[1]).double()]
        tried += [scale_by_hand(block, fold, inputs(model)[fold.targets[0]], a) for a in ALPHAS]
        losses = []
        for scale in tried:
            activation = Activation("token")
            if activations == "static":
                assert stat.low is not None
                assert stat.high is not None
                low = min(float((stat.low / scale).min()), 0.0)
                high = max(float((stat.high / scale).max()), 0.0)
                step = (high - low) / 255
                activation = Activation("tensor", step, round(-low / step))
            got = int8_product(x.double() / scale, *round_rows(weight * scale), activation)
            want = x.double() @ weight.double().T
            losses.append(float(((got - want).square().sum(1) / want.square().sum(1)).mean()))
            # The search's own measure is this arithmetic in float32; ties round either way.
            assert simulated_error(weight, scale.float(), stat, config) == pytest.approx(
                losses[-1], rel=0.02
            )
        found = choose_scale(block, fold, stat, config).double()
        near = [torch.allclose(found, scale, rtol=1e-3) for scale in tried]
        assert any(near), fold.source
        assert losses[near.index(True)] <= min(losses) * 1.02


# --- the whole block ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [SmoothQuantConfig(), FIXED, replace(FIXED, alpha=0.8, activations="dynamic"), NAIVE],
    ids=["search", "0.5", "dynamic 0.8", "naive"],
)
@pytest.mark.parametrize("name", FIRST_CLASS)
def test_folding_keeps_the_function_and_the_rest_is_rounding(
    name: str, config: SmoothQuantConfig
) -> None:
    model, ids = planted(name), token_ids(2, 30, seed=9)
    before = logits(model.module, ids)
    packed = quantize(model, config)
    torch.testing.assert_close(logits(model.module, ids), before, rtol=0, atol=2e-3)
    seen = inputs(model)
    for path, weight in packed.items():
        folded = block_of(model).linears[path].weight
        codes, steps = round_rows(folded)
        stored, scales, zeros = weight.unpacked()
        assert (weight.bits, weight.zeros, set(zeros.flatten().tolist())) == (8, None, {128.0})
        torch.testing.assert_close(scales[:, 0].double(), steps, rtol=1e-6, atol=0)
        differing = stored.long() - 128 != codes
        assert float(differing.double().mean()) < 1e-3  # ties between float32 and float64
        activation = weight.activation
        assert activation is not None
        x = seen[path]
        if config.activations == "dynamic":
            assert activation.kind == "token"
            continue
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        assert activation.kind == "tensor"
        assert activation.scale == pytest.approx((high - low) / 255, rel=1e-3)
        assert abs(activation.zero + low / activation.scale) <= 0.51
        # Nothing that calibration saw is clipped by more than the rounding of the zero-point.
        x_codes, _ = round_inputs(x, activation)
        assert float((x_codes * activation.scale - x).abs().max()) <= activation.scale * 1.01


def test_naive_w8a8_folds_nothing() -> None:
    model = planted("llama")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    quantize(model, NAIVE)
    assert all(torch.equal(before[n], t) for n, t in model.module.state_dict().items())


def test_norms_only_where_linears_may_not_be_folded() -> None:
    model = planted("llama")
    block = block_of(model)
    down = block.linears["mlp.down_proj"].weight.clone()
    up = block.linears["mlp.up_proj"].weight.clone()
    quantize(model, replace(FIXED, fold_linears=False))
    assert torch.equal(block.linears["mlp.down_proj"].weight, down)
    assert not torch.equal(block.linears["mlp.up_proj"].weight, up)


# --- the claim ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", [SmoothQuantConfig(), FIXED], ids=["search", "0.5"])
@pytest.mark.parametrize("name", FIRST_CLASS)
def test_far_better_than_naive_static_w8a8_on_planted_outliers(
    name: str, config: SmoothQuantConfig, seed: int
) -> None:
    """Channels 25 times larger than the others take most of the 256 levels from them."""
    naive, smooth = (errors_of(planted(name, seed), c) for c in (NAIVE, config))
    for fold in block_of(tiny(name)).folds:
        ours, theirs = (sum(e[target] for target in fold.targets) for e in (smooth, naive))
        assert ours < (0.2 if config.search and fold.kind != "value" else 0.4) * theirs


def test_massive_activations_of_down_need_the_fold_through_up() -> None:
    """Folding into the norms alone cannot reach them."""
    with_linears = errors_of(planted("llama"), SmoothQuantConfig())
    norms_only = errors_of(planted("llama"), SmoothQuantConfig(fold_linears=False))
    naive = errors_of(planted("llama"), NAIVE)
    assert with_linears["mlp.down_proj"] < 0.2 * norms_only["mlp.down_proj"]
    assert norms_only["mlp.down_proj"] == pytest.approx(naive["mlp.down_proj"], rel=0.05)


def test_dynamic_scales_lose_less_than_static_ones() -> None:
    for base in (NAIVE, SmoothQuantConfig()):
        static = errors_of(planted("llama"), base)
        dynamic = errors_of(planted("llama"), replace(base, activations="dynamic"))
        assert sum(dynamic.values()) < sum(static.values())


# --- refusals and corners ----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_are_refused_before_any_fold(bad: float) -> None:
    model = planted("llama")
    stats = dict(statistics(model, "smoothquant"))
    spoilt = stats["mlp.down_proj"].max_abs.clone()
    spoilt[4] = bad
    stats["mlp.down_proj"] = replace(stats["mlp.down_proj"], low=spoilt)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    with pytest.raises(MethodError, match=r"mlp\.down_proj are not finite"):
        METHODS["smoothquant"].quantize_block(block_of(model), stats, SmoothQuantConfig())
    assert all(torch.equal(before[n], t) for n, t in model.module.state_dict().items())


def test_alpha_between_zero_and_naive_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"alpha=-0\.5: needs 0 to 1, or -1"):
        SmoothQuantConfig(alpha=-0.5).validate()
    for alpha in (-1.0, 0.0, 1.0):
        SmoothQuantConfig(alpha=alpha).validate()


def test_channels_and_rows_of_zeros() -> None:
    model = planted("llama")
    block, ids = block_of(model), token_ids(2, 30, seed=9)
    block.module.input_layernorm.weight[[5, 20]] = 0
    block.linears["mlp.down_proj"].weight[:, 9] = 0
    block.linears["mlp.down_proj"].weight[3] = 0
    before = logits(model.module, ids)
    packed = quantize(model, SmoothQuantConfig())
    torch.testing.assert_close(logits(model.module, ids), before, rtol=0, atol=2e-3)
    for weight in packed.values():
        assert bool(torch.isfinite(weight.dequantize()).all())
    assert not bool(packed["mlp.down_proj"].dequantize()[3].any())


def test_static_range_by_hand() -> None:
    """x / s spans [-2, 3.1]."""
    stats = ActStats(1, low=torch.tensor([-4.0, -1.0]), high=torch.tensor([2.0, 3.1]))
    low, high = static_range(stats, torch.tensor([2.0, 1.0]))
    assert (float(low), float(high)) == pytest.approx((-2.0, 3.1))
