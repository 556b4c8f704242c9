"""The loops of quantizing in C++ against float64, on every level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import native, native_solve
from kernels.native_compare import compare_logits
from quantlab.grid import range_to_grid

pytestmark = [pytest.mark.xdist_group("native"), pytest.mark.usefixtures("level")]

U = 2.0**-24
seeds = st.integers(0, 2**16)
some_rows = st.integers(1, 50)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def second_moments(groups: int, size: int, seed: int) -> Tensor:
    x = noise(groups, size + 3, size, seed=seed) * torch.exp(noise(size, seed=seed + 1))
    return x.transpose(1, 2) @ x / (size + 3)


@settings(deadline=None, max_examples=40)
@given(
    rows=some_rows,
    columns=st.integers(1, 40),
    bits=st.integers(2, 8),
    owing=st.booleans(),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=seeds,
)
def test_columns_answer_for_those_before_them(
    rows: int, columns: int, bits: int, owing: bool, part: tuple[float, float], seed: int
) -> None:
    first, last = sorted(int(share * columns) for share in part)
    group_of = torch.randint(0, 3, (columns,), generator=torch.Generator().manual_seed(seed))
    work = noise(columns, rows, seed=seed)
    before = work.clone()
    steps = torch.rand(3, rows, generator=torch.Generator().manual_seed(seed)) + 0.05
    bottoms = -torch.randint(0, 2**bits, (3, rows)).float()
    pull, debt = (noise(columns, columns, seed=seed + n).triu(1) * 0.3 for n in (1, 2))
    whole, errors = torch.full_like(work, 7.0), torch.full_like(work, 7.0)
    native_solve.compensate(
        *(work, steps, bottoms, group_of, 2**bits - 1, whole, errors, pull.t().contiguous()),
        debt.t().contiguous() if owing else None,
        slice(first, last),
    )
    step, bottom = steps[group_of], bottoms[group_of]
    outside = [j for j in range(columns) if not first <= j < last]
    assert torch.equal(work[outside], before[outside])
    assert bool((whole[outside] == 7).all())
    done = slice(first, last)
    # From the answers themselves: what each column had to be, its code, and its error.
    value = before[done].double() - pull[done, done].double().t() @ errors[done].double()
    size = (
        before[done].double().abs()
        + pull[done, done].double().abs().t() @ errors[done].abs().double()
    )
    if owing:
        value += debt[done, done].double().t() @ work[done].double()
        size += debt[done, done].double().abs().t() @ work[done].abs().double()
    assert bool(((work[done] - value).abs() <= (columns + 4) * U * size + 1e-30).all())
    codes = torch.round(work[done] / step[done])
    codes = torch.clamp(codes, bottom[done], bottom[done] + 2**bits - 1)
    assert torch.equal(whole[done], codes)
    left = work[done].double() - codes.double() * step[done].double()
    reach = work[done].abs() + (codes * step[done]).abs()
    assert bool(((errors[done] - left).abs() <= 2 * U * reach).all())


def losses(
    weight: Tensor, moments: Tensor | None, scale: Tensor, zero: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """e M_g e^T of the grids [..., rows, groups] in float64, and how far float32 may be off."""
    groups, size = weight.shape[1:]
    w, s, z = weight.double(), scale.double()[..., None], zero.double()[..., None]
    e = torch.clamp(torch.round(w / s), -z, 2**bits - 1 - z) * s - w
    m = torch.eye(size).expand(groups, -1, -1).double() if moments is None else moments.double()
    want = torch.einsum("...rgi,gij,...rgj->...rg", e, m, e)
    # Each e is off by its own rounding; where w / s is a tie, by a sign, at the same square.
    reach = w.abs() + (e + w).abs()
    first_order = 2 * torch.einsum("...rgi,gij,...rgj->...rg", e.abs(), m.abs(), 3 * U * reach)
    # On AMX tiles M and e have two bfloat16 parts: what is left of M is 2^-17, of e 2^-16 (its
    # second part is cut off), and the product of both second parts is 2^-18.
    amx = moments is not None and native.native().level.name == "amx"
    parts = (size + 8) * U + (2.0**-15 if amx else 0.0)
    return want, first_order + parts * torch.einsum(
        "...rgi,gij,...rgj->...rg", e.abs(), m.abs(), e.abs()
    )


@settings(deadline=None, max_examples=60)
@given(
    rows=some_rows,
    groups=st.integers(1, 4),
    size=st.integers(1, 70),
    tries=st.integers(1, 6),
    bits=st.integers(2, 8),
    weighed=st.booleans(),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    magnitude=st.sampled_from([1e-9, 1e-5, 1.0, 1e3]),
    seed=seeds,
)
def test_the_best_of_many_grids(
    rows: int,
    groups: int,
    size: int,
    tries: int,
    bits: int,
    weighed: bool,
    symmetric: bool,
    dtype: torch.dtype,
    magnitude: float,
    seed: int,
) -> None:
    weight = noise(rows, groups, size, seed=seed) * magnitude
    moments = second_moments(groups, size, seed) if weighed else None
    fractions = torch.linspace(1.0, 0.4, tries)
    scale, zero = native_solve.best_grids(weight, moments, fractions, bits, symmetric, dtype)
    ranges = [
        range_to_grid(f * weight.amin(-1), f * weight.amax(-1), bits, symmetric) for f in fractions
    ]
    steps = torch.stack([s for s, _ in ranges])
    if dtype != torch.float32:
        steps = steps.clamp_min(torch.finfo(dtype).tiny)
    stored, zeros = steps.to(dtype).float(), torch.stack([z for _, z in ranges])
    # One of the tries: its product and difference may have been rounded together.
    close = (steps - scale).abs() <= (torch.finfo(dtype).eps + 4 * U) * steps
    near = (zeros - zero).abs() <= 1
    assert bool((close & near).any(0).all())
    assert torch.equal(scale.to(dtype).float(), scale)
    best, off = losses(weight, moments, stored, zeros, bits)
    found, slack = losses(weight, moments, scale, zero, bits)
    assert bool((found - slack <= (best + off).amin(0) * (1 + 1e-6) + 1e-30).all())


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 150), columns=st.integers(1, 60), less=st.booleans(), seed=seeds)
def test_columns_in_another_order_and_back(rows: int, columns: int, less: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, places = noise(rows, columns, seed=seed), torch.randperm(columns, generator=generator)
    turned = native_solve.turn(weight, places)
    assert turned.shape == (columns, rows)
    assert torch.equal(turned[places], weight.t())
    if not less:
        assert torch.equal(native_solve.turn_back(turned, places), weight)
        return
    offsets = noise(4, rows, seed=seed + 1)
    group_of = torch.randint(0, 4, (columns,), generator=generator)
    back = native_solve.turn_back(turned, places, (offsets, group_of))
    assert torch.equal(back, (turned - offsets[group_of])[places].t())


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 140),
    group=st.one_of(st.integers(1, 70), st.sampled_from([32, 64, 4096])),
    bits=st.integers(2, 8),
    seed=seeds,
)
def test_products_of_groups_of_codes(
    rows: int, columns: int, group: int, bits: int, seed: int
) -> None:
    if not native_solve.multiplies_bfloat16():
        pytest.skip("this CPU multiplies no bfloat16")
    groups = -(-columns // group)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator).float()
    zero = torch.randint(0, 2**bits, (rows, groups), generator=generator).float()
    weight, moment = noise(rows, columns, seed=seed), second_moments(1, columns, seed)[0]
    moment = (moment + moment.t()) / 2
    system, right = native_solve.group_products(weight, codes, zero, moment, group)
    inside = torch.arange(columns) // group == torch.arange(groups)[:, None]
    values = (codes - zero.repeat_interleave(group, 1)[:, :columns]).double()
    v = torch.where(inside, values[:, None], 0.0)
    m, w = moment.double(), weight.double()
    # Codes and all bits of M enter: only sums are rounded, over columns and three parts twice.
    share = (4 * columns + 8) * U
    bound = share * (v.abs() @ m.abs() @ v.abs().transpose(1, 2))
    assert bool(((system.double() - v @ m @ v.transpose(1, 2)).abs() <= bound + 1e-30).all())
    bound = share * (v.abs() @ m.abs() @ w.abs()[..., None])[..., 0]
    assert bool(((right.double() - (v @ m @ w[..., None])[..., 0]).abs() <= bound + 1e-30).all())
    assert torch.equal(system, system.transpose(1, 2))


@settings(deadline=None, max_examples=40)
@given(
    rows=some_rows,
    columns=st.integers(1, 100),
    group=st.integers(1, 70),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    seed=seeds,
)
def test_rounding_errors_of_scaled_weights(
    rows: int, columns: int, group: int, bits: int, symmetric: bool, seed: int
) -> None:
    weight, scale = noise(rows, columns, seed=seed), torch.exp(noise(columns, seed=seed + 1))
    got = native_solve.scaled_error(weight, scale, group, bits, symmetric).double()
    scaled = (weight * scale).double()
    for first in range(0, columns, group):
        part = slice(first, first + group)
        v = scaled[:, part]
        if symmetric:
            step = v.abs().amax(1) / max(2 ** (bits - 1) - 1, 1)
            codes = torch.round((v + got[:, part] * scale[part]) / step[:, None]) + 2 ** (bits - 1)
        else:
            low, high = v.amin(1).clamp_max(0), v.amax(1).clamp_min(0)
            step = (high - low) / (2**bits - 1)
            codes = (v + got[:, part] * scale[part] - low[:, None]) / step[:, None]
        # On the grid, inside it, and half a step away (one, where the grid's end was rounded).
        reach = (0.5 if symmetric else 1.0) * step[:, None] + 1e-4 * v.abs().amax(1, keepdim=True)
        error = got[:, part] * scale[part]
        assert bool((error.abs() <= reach).all())
        assert bool((codes >= -0.51).all())
        assert bool((codes <= 2**bits - 0.49).all())
        whole = (v + error) / step[:, None]
        assert bool(((whole - torch.round(whole)).abs() < 1e-3).all())


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 5),
    count=st.one_of(st.integers(1, 70), st.sampled_from([2048, 2049, 5000])),
    apart=st.sampled_from([0.0, 0.01, 3.0]),
    seed=seeds,
)
def test_logits_against_each_other(rows: int, count: int, apart: float, seed: int) -> None:
    p = noise(rows, count, seed=seed) * 5
    q = p + apart * noise(rows, count, seed=seed + 1)
    targets = torch.randint(0, count, (rows,), generator=torch.Generator().manual_seed(seed))
    loss, kl, same = compare_logits(p, q, targets)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    # e^x is good to 2 units in the last place, and x - log sum e^x, a difference of numbers up to
    # 40, is rounded once more.
    torch.testing.assert_close(loss, -log_q.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-5)
    want = (log_p.exp() * (log_p - log_q)).sum(-1)
    bound = 40 * 8 * U * (1 + (p - q).abs().amax(-1).double())
    assert bool(((kl - want).abs() <= bound).all())
    assert torch.equal(same, p.argmax(-1) == q.argmax(-1))


def test_a_token_that_is_ruled_out_adds_nothing() -> None:
    p = torch.tensor([[0.0, 0.0, -torch.inf]])
    q = torch.tensor([[0.0, -torch.inf, 0.0]])
    loss, kl, same = compare_logits(p, p, torch.tensor([0]))
    assert (float(kl), bool(same)) == (0.0, True)
    assert float(loss) == pytest.approx(0.6931472)
    assert float(compare_logits(p, q, torch.tensor([1]))[1]) == torch.inf
