"""GPTQ against the plainest form of itself: float64, a new inverse for every column.

The paper's claim is tested as well: less output error than rounding on the same grid.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantlab.calibration import ActStats
from quantlab.compensation import LAZY_BLOCK, inverse_cholesky, inverse_factor
from quantlab.errors import ConfigError, MethodError
from quantlab.grid import find_grid, from_codes, spread, to_codes
from quantlab.methods import METHODS
from quantlab.methods.gptq import GPTQConfig, gptq, shared_inputs
from tests.methods.slow_grid import check_grid
from tests.tiny import correlated, lone_block, random

PLAIN = GPTQConfig(
    group_size=32, act_order=False, clip=False, refit=False, damp_percent=0.01, gptaq="never"
)
VARIANTS = {
    "plain": PLAIN,
    "damped": replace(PLAIN, damp_percent=0.1),
    "3 bits": replace(PLAIN, bits=3),
    "2 bits": replace(PLAIN, bits=2),
    "8 bits": replace(PLAIN, bits=8),
    "one group a row": replace(PLAIN, group_size=65536),
    "groups across lazy blocks": replace(PLAIN, group_size=48),
    "symmetric": replace(PLAIN, symmetric=True),
    "clip": replace(PLAIN, clip=True),
    "act-order": replace(PLAIN, act_order=True),
    "act-order, ragged": replace(PLAIN, act_order=True, group_size=48),
    "act-order, symmetric, clip": replace(PLAIN, act_order=True, symmetric=True, clip=True),
    "dynamic groups": replace(PLAIN, static_groups=False),
    "dynamic groups across lazy blocks": replace(PLAIN, static_groups=False, group_size=48),
    "dynamic groups, longer than a lazy block": replace(PLAIN, static_groups=False, group_size=150),
    "dynamic groups, symmetric, clip": replace(
        PLAIN, static_groups=False, symmetric=True, clip=True
    ),
    "damped by channel": replace(PLAIN, damping="channel", damp_percent=0.1),
    "asymmetric": replace(PLAIN, gptaq="always", gptaq_strength=1.0),
    "asymmetric, act-order, ragged, 2 bits": replace(
        PLAIN, gptaq="always", gptaq_strength=0.4, act_order=True, group_size=48, bits=2
    ),
    "the defaults, before scales are refitted": GPTQConfig(refit=False),
}


def moment_of(x: Tensor) -> Tensor:
    return (x.double().T @ x.double() / len(x)).float()


def reference(
    weight: Tensor,
    moment: Tensor,
    config: GPTQConfig,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    cross: Tensor | None = None,
) -> tuple[int, float]:
    """Walk through GPTQ in float64 beside the given answer: (codes that differ, how far a differing
    code's real value was from the nearest rounding boundary, in steps).

    For the columns F not yet done, with H the damped second moment, fixing column j at its rounded
    value is best answered by  w_F -= (w_j - q_j) / [H_F^-1]_jj * [H_F^-1]_j,F.  The inverse is
    computed anew each time. Where the answer's code differs, the walk goes on with the answer's, so
    that one tie does not spoil what comes after it; grids likewise. With asymmetric calibration the
    columns after j are also moved towards  w_j E[(y_j - x_j) x_F^T] H_F^-1,  the least-squares
    answer to w_j (y_j - x_j).
    """
    hessian, work = moment.double().clone(), weight.double().clone()
    columns = work.shape[1]
    dead = [j for j in range(columns) if hessian[j, j] == 0]
    alive = [j for j in range(columns) if hessian[j, j] != 0]
    mean = sum(float(hessian[j, j]) for j in alive) / len(alive)
    for j in dead:
        work[:, j] = 0
        hessian[j, j] = 1
    for j in range(columns):
        own = config.damping == "channel"
        hessian[j, j] += config.damp_percent * (float(hessian[j, j]) if own else mean)
    order = list(range(columns))
    if config.act_order:
        order.sort(key=lambda j: -float(moment[j, j]))
    group = min(config.group_size, columns)
    starts = range(0, columns, group)

    def check(start: int) -> None:
        part = slice(start, min(start + group, columns))
        g = start // group
        check_grid(
            work[:, part], moment[part, part].double(), config.bits, scale[:, g], zero[:, g],
            symmetric=config.symmetric, clip=config.clip,
        )  # fmt: skip

    if config.static_groups:
        for start in starts:
            check(start)
    differing, furthest = 0, 0.0
    for position, j in enumerate(order):
        if not config.static_groups and j in starts:
            check(j)
        s, z = scale[:, j // group].double(), zero[:, j // group].double()
        exact = work[:, j] / s + z
        code = exact.round().clamp(0, 2**config.bits - 1)
        other = code != codes[:, j]
        if bool(other.any()):
            differing += int(other.sum())
            away = (exact.clamp(0, 2**config.bits - 1) - codes[:, j].double()).abs() - 0.5
            furthest = max(furthest, float(away[other].max()))
        rest, later = order[position:], order[position + 1 :]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        value = work[:, j].clone()
        error = (value - (codes[:, j].double() - z) * s) / inverse[0, 0]
        work[:, rest] -= error[:, None] * inverse[0]
        if config.asymmetric and later:
            assert cross is not None
            owed = cross[j, later].double() - moment[j, later].double()
            move = owed @ torch.linalg.inv(hessian[later][:, later])
            work[:, later] += config.gptaq_strength * value[:, None] * move
    return differing, furthest


@pytest.mark.parametrize("name", VARIANTS)
def test_codes_are_those_of_the_slow_reference(name: str) -> None:
    config, rows, columns = VARIANTS[name], 6, 160
    assert columns > LAZY_BLOCK
    weight = random(rows, columns, seed=1)
    x = correlated(300, columns, seed=2)
    x[:, [3, 40, 130]] = 0  # channels that never fire
    moment = moment_of(x)
    original = x + 0.2 * correlated(300, columns, seed=5)
    cross = (original.double().T @ x.double() / len(x)).float()
    codes, scale, zero = gptq(weight, moment, config, cross)
    assert codes.dtype == torch.uint8
    differing, furthest = reference(weight, moment, config, codes, scale, zero, cross)
    # float32 keeps compensated weights to about 1e-5 of themselves; an 8-bit step is 1/255 of them.
    assert furthest < 0.02 if config.bits == 8 else furthest < 2e-3
    assert differing <= 0.01 * codes.numel()


def test_refitting_changes_scales_alone_and_helps() -> None:
    """Less output error on inputs that calibration did not see."""
    weight, both = random(24, 160, seed=1), correlated(1200, 160, seed=2)
    x, unseen = both.split(600)
    config = GPTQConfig(bits=3, group_size=32, gptaq="never")
    codes, scale, zero = gptq(weight, moment_of(x), replace(config, refit=False))
    same, refitted, unmoved = gptq(weight, moment_of(x), config)
    assert torch.equal(same, codes)
    assert torch.equal(unmoved, zero)

    def error(steps: Tensor) -> float:
        values = from_codes(codes.float(), spread(steps, 32, 160), spread(zero, 32, 160))
        return output_error(weight, values, unseen)

    assert error(refitted) < error(scale)


def test_the_reference_notices_a_wrong_answer() -> None:
    """Rounding without compensation is no near-tie of GPTQ."""
    weight, moment = random(6, 96, seed=1), moment_of(correlated(300, 96, seed=2))
    scale, zero = find_grid(weight, 4, 32, symmetric=False, scale_dtype=torch.float16)
    codes = to_codes(weight, spread(scale, 32, 96), spread(zero, 32, 96), 4).to(torch.uint8)
    differing, furthest = reference(weight, moment, PLAIN, codes, scale, zero)
    assert differing > 100
    assert furthest > 0.3


def output_error(weight: Tensor, quantized: Tensor, x: Tensor) -> float:
    """Mean squared error of the outputs, relative to the outputs, with X really run through."""
    wanted = x.double() @ weight.double().T
    return float(((x.double() @ quantized.double().T - wanted) ** 2).mean() / (wanted**2).mean())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "config",
    [
        replace(PLAIN, bits=bits, act_order=act_order, symmetric=symmetric)
        for bits in (2, 3, 4, 8)
        for act_order in (False, True)
        for symmetric in (False, True)
    ],
    ids=lambda c: f"{c.bits}-{'order' if c.act_order else 'plain'}-{'sym' if c.symmetric else 'z'}",
)
def test_less_output_error_than_rounding_on_the_same_grid(config: GPTQConfig, seed: int) -> None:
    """The claim of the paper, also on inputs that calibration has not seen."""
    weight, x = random(24, 96, seed=seed), correlated(1024, 96, seed=10 + seed)
    seen, unseen = x[:512], x[512:]
    codes, scale, zero = gptq(weight, moment_of(seen), config)
    wide, offset = spread(scale, 32, 96), spread(zero, 32, 96)
    ours = (codes - offset) * wide
    same_scale, same_zero = find_grid(
        weight, config.bits, 32, symmetric=config.symmetric, scale_dtype=torch.float16
    )
    assert torch.equal(scale, same_scale)
    assert torch.equal(zero, same_zero)
    nearest = (to_codes(weight, wide, offset, config.bits) - offset) * wide
    assert output_error(weight, ours, seen) < 0.75 * output_error(weight, nearest, seen)
    assert output_error(weight, ours, unseen) < 0.8 * output_error(weight, nearest, unseen)


@pytest.mark.parametrize("seed", range(3))
def test_act_order_and_clipping_help_at_two_bits(seed: int) -> None:
    """Averages over seeds would hide a variant that is wired to nothing; each seed must gain."""
    weight, x = random(24, 96, seed=seed), correlated(512, 96, seed=20 + seed)

    def error(config: GPTQConfig) -> float:
        codes, scale, zero = gptq(weight, moment_of(x), config)
        return output_error(weight, (codes - spread(zero, 32, 96)) * spread(scale, 32, 96), x)

    plain = replace(PLAIN, bits=2)
    assert error(replace(plain, act_order=True)) < error(plain)
    assert error(replace(plain, clip=True)) < error(plain)


def aim_error(weight: Tensor, quantized: Tensor, x: Tensor, y: Tensor) -> float:
    """Mean squared distance of the quantized outputs on x to the original's on y."""
    return float((x.double() @ quantized.double().T - y.double() @ weight.double().T).pow(2).mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_asymmetric_calibration_comes_nearer_to_the_original_output(seed: int, bits: int) -> None:
    """The claim of GPTAQ: x is y behind layers that shrank some directions and added noise."""
    weight, y = random(24, 96, seed=seed), correlated(2000, 96, seed=20 + seed)
    x = y @ (torch.eye(96) + 0.05 * random(96, 96, seed=40 + seed)) * 0.9
    cross = (y.double().T @ x.double() / len(x)).float()

    def error(config: GPTQConfig) -> float:
        codes, scale, zero = gptq(weight, moment_of(x), config, cross)
        quantized = (codes - spread(zero, 32, 96)) * spread(scale, 32, 96)
        return aim_error(weight, quantized, x, y)

    plain = GPTQConfig(bits=bits, group_size=32, damp_percent=0.01, gptaq="never")
    asymmetric = replace(plain, gptaq="always", gptaq_strength=1.0)
    assert error(asymmetric) < 0.9 * error(plain)
    assert error(asymmetric) < error(replace(asymmetric, gptaq_strength=0.25)) < error(plain)


def test_equal_streams_leave_plain_gptq() -> None:
    weight, moment = random(8, 96, seed=1), moment_of(correlated(300, 96, seed=2))
    plain = gptq(weight, moment, PLAIN)
    asymmetric = gptq(weight, moment, replace(PLAIN, gptaq="always", gptaq_strength=1.0), moment)
    assert all(torch.equal(a, b) for a, b in zip(plain, asymmetric, strict=True))


def test_damping_by_channel_does_not_depend_on_the_units_of_a_channel() -> None:
    """With x_j in other units, U_j is in their inverse: a massive channel cannot swamp the others.
    Damping by the mean is no such thing."""
    moment, alive = moment_of(correlated(300, 64, seed=2)), torch.zeros(64, dtype=torch.bool)
    units = 2.0 ** torch.arange(64).remainder(9)
    for own in (True, False):
        upper = inverse_factor(moment, alive, 0.1, own)
        other = inverse_factor(moment * units * units[:, None], alive, 0.1, own) * units
        assert torch.allclose(upper, other, rtol=1e-4, atol=1e-5 * float(upper.max())) == own
    damped = moment.double() + 0.1 * moment.double().diagonal().diag()
    upper = inverse_factor(moment, alive, 0.1, own=True).double()
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(64).double(), rtol=0, atol=1e-4)


def test_uncorrelated_inputs_leave_plain_rounding() -> None:
    weight, sizes = random(5, 64, seed=3), torch.exp(random(64, seed=4))
    codes, scale, zero = gptq(weight, sizes.diag(), PLAIN)
    nearest = to_codes(weight, spread(scale, 32, 64), spread(zero, 32, 64), 4)
    assert torch.equal(codes.float(), nearest)


def test_channels_that_never_fire_become_zero() -> None:
    weight, x = random(4, 64, seed=5), correlated(200, 64, seed=6)
    x[:, :32] = 0  # a whole group, too
    x[:, 50] = 0
    codes, scale, zero = gptq(weight, moment_of(x), GPTQConfig(group_size=32))
    quantized = (codes - spread(zero, 32, 64)) * spread(scale, 32, 64)
    assert bool((quantized[:, :32] == 0).all())
    assert bool((quantized[:, 50] == 0).all())
    assert bool(torch.isfinite(quantized).all())
    assert output_error(weight, quantized, x) < 0.01


def test_no_channel_fires() -> None:
    codes, scale, zero = gptq(random(4, 64), torch.zeros(64, 64), GPTQConfig())
    assert bool(torch.isfinite(scale).all())
    assert bool(((codes - spread(zero, 64, 64)) == 0).all())


def test_rows_do_not_influence_each_other() -> None:
    """Linears with one input are quantized as one matrix, and come back apart."""
    weights = {name: random(rows, 64, seed=rows) for name, rows in (("q", 9), ("k", 3), ("v", 5))}
    shared = ActStats(300, second_moment=moment_of(correlated(300, 64, seed=2)))
    config = GPTQConfig(group_size=32)
    together = METHODS["gptq"].quantize_block(
        lone_block(weights), dict.fromkeys(weights, shared), config
    )
    apart = {name: replace(shared) for name in weights}
    assert len(shared_inputs(apart)) == 3
    assert shared_inputs(dict.fromkeys(weights, shared)) == [["q", "k", "v"]]
    alone = METHODS["gptq"].quantize_block(lone_block(weights), apart, config)
    for name, weight in weights.items():
        assert together[name].shape == weight.shape
        assert torch.equal(together[name].dequantize(), alone[name].dequantize())
        codes, scale, zero = gptq(weight, shared.second_moment, config)
        wanted = (codes - spread(zero, 32, 64)) * spread(scale, 32, 64)
        assert torch.equal(together[name].dequantize(), wanted)


# --- the inverse -------------------------------------------------------------------------------


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    moment = moment_of(correlated(300, 40, seed=7)).double()
    upper = inverse_factor(moment.float(), torch.zeros(40, dtype=torch.bool), 0.05)
    assert torch.equal(upper, upper.triu())
    damped = moment + 0.05 * moment.diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(
        upper.double().T @ upper.double() @ damped, torch.eye(40).double(), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("at_once", [1, 7, 192])
@pytest.mark.parametrize("columns", [1, 2, 40, 61])
def test_the_inverse_factor_by_halves(
    columns: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is cut up: L^-1 A L^-T = 1, against float64, to the condition of A's factor."""
    monkeypatch.setattr("quantlab.compensation.FACTORED_AT_ONCE", at_once)
    matrix = moment_of(correlated(300, columns, seed=7)) + 0.1 * torch.eye(columns)
    inverse = inverse_cholesky(matrix)
    assert inverse is not None
    assert torch.equal(inverse, inverse.tril())
    wanted = torch.linalg.inv(torch.linalg.cholesky(matrix.double()))
    condition = float(torch.linalg.cond(matrix.double()))
    bound = 4 * columns * 2.0**-24 * condition * float(wanted.abs().max())
    assert float((inverse.double() - wanted).abs().max()) <= bound
    # Not positive definite, wherever that shows: in the first half or only behind it.
    for place in {0, columns - 1}:
        broken = matrix.clone()
        broken[place, place] = -1.0
        assert inverse_cholesky(broken) is None


def test_damping_grows_until_the_inverse_exists() -> None:
    """Smallest eigenvalue -0.5 with a mean diagonal of 1: damping of 0.01 and 0.1 do not suffice,
    1 does."""
    moment = torch.tensor([[1.0, 1.5], [1.5, 1.0]])
    upper = inverse_factor(moment, torch.zeros(2, dtype=torch.bool), 0.01)
    wanted = torch.linalg.inv(moment + torch.eye(2))
    torch.testing.assert_close(upper.T @ upper, wanted, rtol=1e-4, atol=1e-5)


def test_a_hopeless_moment_is_refused() -> None:
    moment = torch.tensor([[1.0, 1e6], [1e6, 1.0]])
    with pytest.raises(MethodError, match="raise damp_percent or calibrate on more tokens"):
        inverse_factor(moment, torch.zeros(2, dtype=torch.bool), 0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(bad: float) -> None:
    moment = torch.eye(32)
    moment[3, 4] = bad
    with pytest.raises(MethodError, match="not finite"):
        gptq(random(4, 32), moment, GPTQConfig())


def test_asymmetric_calibration_needs_static_groups() -> None:
    with pytest.raises(ConfigError, match="gptaq=always needs static_groups=true"):
        GPTQConfig(static_groups=False, act_order=False, gptaq="always").validate()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"bits": 2}, True),
        ({"bits": 3}, True),
        ({"bits": 4}, False),
        ({"bits": 3, "static_groups": False, "act_order": False}, False),
        ({"bits": 4, "gptaq": "always"}, True),
        ({"bits": 2, "gptaq": "never"}, False),
    ],
)
def test_asymmetric_calibration_is_chosen_by_the_bits(
    options: dict[str, Any], wanted: bool
) -> None:
    config = GPTQConfig(**options)
    config.validate()
    assert config.asymmetric == wanted
    assert ("cross_moment" in METHODS["gptq"].needs_for(config)) == wanted


def test_act_order_needs_static_groups() -> None:
    with pytest.raises(ConfigError, match="act_order=true needs static_groups=true"):
        GPTQConfig(static_groups=False).validate()
    GPTQConfig(static_groups=False, act_order=False).validate()
