"""GPTQ column by column, against a loop that rounds, divides and pushes one column at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantlab.learn import columns, material
from quantlab.learn.columns import COLUMNS, DAMPING, ROWS
from quantlab.learn.material import Slice
from quantlab.methods.gptq import GPTQConfig, gptq


def parts(layer: str) -> tuple[Slice, np.ndarray, np.ndarray]:
    """(slice, weight, damped moment), float64, of the columns that are shown."""
    one = material.load(layer=layer)
    x = one.inputs[:, :COLUMNS].double().numpy()
    moment = x.T @ x / len(x)
    damped = moment + DAMPING * np.trace(moment) / COLUMNS * np.eye(COLUMNS)
    return one, one.weight[:ROWS, :COLUMNS].double().numpy(), damped


def grid(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    low = np.minimum(weight.min(1), 0)
    high = np.maximum(weight.max(1), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
    return scale.astype(np.float16).astype(np.float64), zero


def optimal_brain(
    weight: np.ndarray, damped: np.ndarray, bits: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """The textbook form: after each column its row and column leave the inverse of H.

    No Cholesky factor: the inverse over the columns that are left is computed anew each time."""
    scale, zero = grid(weight, bits)
    work, codes = weight.copy(), np.zeros_like(weight)
    states = [work.copy()]
    for j in range(COLUMNS):
        code = np.clip(np.round(work[:, j] / scale) + zero, 0, 2**bits - 1)
        codes[:, j] = code
        value = (code - zero) * scale
        inverse = np.linalg.inv(damped[j:, j:])
        error = (work[:, j] - value) / inverse[0, 0]
        work[:, j + 1 :] -= np.outer(error, inverse[0, 1:])
        work[:, j] = value
        states.append(work.copy())
    return states, codes


@pytest.mark.parametrize("layer", material.layers())
@pytest.mark.parametrize("bits", [3, 4])
def test_every_step_is_the_textbooks(layer: str, bits: int) -> None:
    one, weight, damped = parts(layer)
    states, codes = optimal_brain(weight, damped, bits)
    walk = columns.walk(one, bits)
    assert len(walk.steps) == COLUMNS + 1
    # A compensated value in the middle between two codes may fall to either in float32; from there
    # on that row goes another way, so rows are compared up to where they part.
    same = (walk.codes.numpy() == codes).cumprod(1).astype(bool)
    assert same[:, -1].mean() > 0.8
    whole = np.abs(weight).max()
    for done, (step, state) in enumerate(zip(walk.steps, states, strict=True)):
        rows = same[:, done - 1] if done else np.ones(ROWS, bool)
        np.testing.assert_allclose(step.values.numpy()[rows], state[rows], atol=2e-4 * whole)
        assert step.done == done
        assert not step.rounding[:, done:].any()


@pytest.mark.parametrize("layer", material.layers())
def test_the_last_step_is_the_methods_own_answer(layer: str) -> None:
    one = material.load(layer=layer)
    part = material.sub(one, ROWS, COLUMNS)
    config = GPTQConfig(
        bits=4, group_size=COLUMNS, act_order=False, clip=False, refit=False, damp_percent=DAMPING
    )
    codes, _, _ = gptq(part.weight, part.moment, config)
    assert torch.equal(columns.walk(one, 4).codes, codes.float())


def test_errors_of_steps_and_of_plain_rounding() -> None:
    one, weight, _ = parts(material.layers()[0])
    x = one.inputs[:, :COLUMNS].double().numpy()
    walk = columns.walk(one, 3)
    whole = np.square(x @ weight.T).sum()
    scale, zero = grid(weight, 3)
    rtn = (
        np.clip(np.round(weight / scale[:, None]) + zero[:, None], 0, 7) - zero[:, None]
    ) * scale[:, None]
    for done in (0, 7, COLUMNS):
        step = walk.steps[done]
        mixed = np.concatenate((rtn[:, :done], weight[:, done:]), 1)
        expected = np.square(x @ (mixed - weight).T).sum() / whole
        assert step.rtn_error == pytest.approx(expected, rel=1e-3, abs=1e-9)
        expected = np.square(x @ (step.values.double().numpy() - weight).T).sum() / whole
        assert step.error == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert walk.steps[-1].error < walk.steps[-1].rtn_error


@pytest.mark.parametrize("column", [0, 20, COLUMNS - 2])
def test_the_push_is_the_least_squares_answer(column: int) -> None:
    """Shares minimise the error of e (x_j + sum_k share_k x_k), damping included."""
    one, _, damped = parts(material.layers()[0])
    found = columns.pull(one, column, DAMPING)
    later = slice(column + 1, COLUMNS)
    best = -np.linalg.solve(damped[later, later], damped[later, column])
    np.testing.assert_allclose(found.share[later].numpy(), best, atol=2e-4)
    assert not found.share[: column + 1].any()
    left = damped[column, column] + best @ damped[later, column]
    assert found.taken == pytest.approx(1 - left / damped[column, column], abs=1e-4)


def test_gptq_beside_rounding_on_seen_and_unseen_tokens() -> None:
    one = material.load()
    found = columns.against(one, 4, 64, 0.1, True)
    assert found.gptq < found.gptq_unseen < found.rtn_unseen
    w = one.weight.double().numpy()
    grouped = w.reshape(len(w), -1, 64)
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    scale = ((high - low) / 15).astype(np.float32)
    zero = np.round(-low / scale)
    scale = scale.astype(np.float16).astype(np.float64)[..., None]
    rtn = (np.clip(np.round(grouped / scale) + zero[..., None], 0, 15) - zero[..., None]) * scale
    x = one.inputs[1::2].double().numpy()
    expected = np.square(x @ (rtn.reshape(w.shape) - w).T).sum() / np.square(x @ w.T).sum()
    assert found.rtn_unseen == pytest.approx(expected, rel=5e-3)
