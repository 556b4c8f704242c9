"""The training loops: losses, schedules, what is learned, and going on after a stop."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantlab.errors import MethodError
from quantlab.training import loops
from quantlab.training.linears import FakeLinear, StepLinear
from quantlab.training.loops import Rates
from quantlab.training.workshop import Workshop
from tests.tiny import random, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact")


def quiet(stage: str, done: int, total: int) -> None:
    """Nobody watches."""


@pytest.mark.parametrize("goal", ["text", "original"])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_head_s_loss_and_gradient_are_autograd_s(goal: str, cap: float | None) -> None:
    model = tiny("llama").module
    model.config.final_logit_softcapping = cap
    model.config.logit_scale = None if cap is None else 0.7
    states, original = random(2, 9, 64, seed=1), random(2, 9, 64, seed=2)
    ids = token_ids(2, 9)
    teacher = original if goal == "original" else None
    loops_tokens, loops.HEAD_TOKENS = loops.HEAD_TOKENS, 5  # several chunks, the last ragged
    try:
        weight = loops.head_weight(model)
        loss, gradient = loops.head_loss(model, states, ids, teacher, weight)
    finally:
        loops.HEAD_TOKENS = loops_tokens

    def logits(x: Tensor) -> Tensor:
        plain = model.lm_head(x.double().float())
        return plain if cap is None else torch.tanh(0.7 * plain / cap) * cap

    x = states.clone().requires_grad_(True)
    if goal == "text":
        wanted = torch.nn.functional.cross_entropy(
            logits(x)[:, :-1].reshape(-1, logits(x).shape[-1]), ids[:, 1:].reshape(-1)
        )
    else:
        p, q = logits(original).log_softmax(-1), logits(x).log_softmax(-1)
        wanted = (p.exp() * (p - q)).sum(-1).mean()
    (slope,) = torch.autograd.grad(wanted, x)
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-4)
    torch.testing.assert_close(gradient, slope, rtol=1e-3, atol=1e-6)


def test_the_rate_rises_then_falls_along_a_cosine() -> None:
    optimizer = loops.optimizer_of([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.2}])
    rates = []
    for step in range(100):
        loops.set_rate(optimizer, step, 100)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.2 / 5, rel=1e-2)
    assert max(rates) == rates[4] == pytest.approx(0.2, rel=1e-2)
    assert all(b < a for a, b in pairwise(rates[4:]))
    assert rates[50] == pytest.approx(0.2 * (0.05 + 0.95 / 2))
    assert rates[-1] == pytest.approx(0.2 * 0.05, rel=0.05)


def test_every_epoch_takes_every_batch_once_in_an_order_of_its_own() -> None:
    order = loops.batch_order(16, 3, seed=4)
    epochs = [order[i : i + 16] for i in (0, 16, 32)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order == loops.batch_order(16, 3, seed=4) != loops.batch_order(16, 3, seed=5)


def layers() -> torch.nn.Module:
    plain = torch.nn.Linear(16, 4)
    weight, scale, zero = plain.weight, torch.full((4, 2), 0.1), torch.full((4, 2), 1.6)
    fake = FakeLinear(plain, weight, scale, zero, 2, 8)
    return torch.nn.ModuleDict(
        {"fake": fake, "fixed": StepLinear.of(fake), "norm": torch.nn.LayerNorm(16)}
    )


def test_rates_are_fractions_of_what_is_learned() -> None:
    module = layers()
    groups = loops.parameter_groups(module, Rates(0.5, 0.2, 0.3, 0.1))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {names[id(group["params"][0])]: group["lr"] for group in groups}
    expected = {"fake.weight": 0.05, "fake.scale": 0.02, "fake.zero": 0.3, "fixed.scale": 0.02}
    for name, rate in expected.items():
        assert found[name] == pytest.approx(rate)
    assert found["norm.weight"] == pytest.approx(0.1)
    assert found["norm.bias"] == pytest.approx(1e-4)  # of size zero: of the least size instead


def test_a_rate_of_zero_freezes() -> None:
    module = layers()
    loops.parameter_groups(module, Rates(0, 0.2, 0, 0))
    learned = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert learned == {"fake.scale", "fixed.scale"}


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    module, target = layers(), [torch.full((1, 3, 4), math.nan)]
    with pytest.raises(MethodError, match="diverged"):
        loops.train_block(
            module,
            module["fake"],
            [random(1, 3, 16)],
            target,
            Rates(1, 1, 1, 1),
            1,
            0,
            lambda _: None,
        )


def test_checkpoints_outlive_a_workshop(tmp_path: Path) -> None:
    first = Workshop(tmp_path / "w", quiet)
    first.save("part", {"a": torch.arange(3)}, {"losses": [0.5]})
    second = Workshop(tmp_path / "w", quiet)
    kept = second.load("part")
    assert kept is not None
    assert torch.equal(kept[0]["a"], torch.arange(3))
    assert kept[1]["losses"] == [0.5]
    assert second.earlier_seconds > 0
    second.clear()
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("damage", [b"", b"{}", b"\x10\x00\x00\x00\x00\x00\x00\x00{"])
def test_a_damaged_checkpoint_counts_as_none(tmp_path: Path, damage: bytes) -> None:
    workshop = Workshop(tmp_path, quiet)
    assert workshop.load("part") is None
    (tmp_path / "part.safetensors").write_bytes(damage)
    assert workshop.load("part") is None


def test_without_a_folder_nothing_is_kept() -> None:
    workshop = Workshop(None, quiet)
    workshop.save("part", {"a": torch.ones(1)}, {})
    assert workshop.load("part") is None
    workshop.clear()


def test_every_token_weighs_the_same_unless_asked_otherwise() -> None:
    """One token a thousand times as large as the others, wrong by 1%; the others by half."""
    module = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(4)})  # something to learn, unused
    target = torch.ones(1, 4, 4)
    target[0, 0] = 1000.0
    wrong = target * torch.tensor([1.01, 1.5, 0.5, 1.5])[None, :, None]

    def forward(x: Tensor) -> Tensor:
        return wrong + 0 * module["norm"].weight

    rates = Rates(0, 0, 0, 0.1)
    for by_token, expected in ((True, (0.01**2 + 3 * 0.25) / 4), (False, 0.01**2)):
        (loss,) = loops.train_block(
            module, forward, [target], [target], rates, 1, 0, lambda _: None, by_token=by_token
        )
        assert loss == pytest.approx(expected, rel=0.01)
