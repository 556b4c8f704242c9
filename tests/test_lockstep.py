"""Lockstep against the slow way: the whole model in float64, run anew for every input."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from quantlab.blockwise import quantize_blocks
from quantlab.calibration import ActStats, BlockRunner
from quantlab.errors import ModelError
from quantlab.lockstep import advance_in_lockstep, shared_leaders
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.models import Block, LoadedModel
from quantlab.packing import PackedWeight
from tests.tiny import FAMILIES, GENERIC, block_of, recorded_inputs, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact")

LENGTH = 24
KINDS = ("second_moment", "cross_moment")


@torch.no_grad()
def inputs_of(module: nn.Module, model: LoadedModel, ids: Tensor) -> dict[str, Tensor]:
    """Every linear's input, float64 [tokens, columns], by full path."""
    module = copy.deepcopy(module).double()
    with recorded_inputs(model.family, module) as seen:
        module(ids, use_cache=False)
    return {path: torch.cat(inputs) for path, inputs in seen.items()}


def near(actual: Tensor | None, wanted: Tensor, size: float) -> None:
    """Within float32 rounding of numbers of this size, a few operations deep."""
    assert actual is not None
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=4e-5 * size)


@pytest.mark.parametrize("pieces", [6, 5, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_input_is_seen_behind_the_linears_solved_before(name: str, pieces: int) -> None:
    """Solving means to weaken a weight by a quarter, so that what comes later differs a lot."""
    model, ids = tiny(name, seed=1), token_ids(pieces, LENGTH)
    untouched = inputs_of(model.module, model, ids)
    runner = BlockRunner(model, ids, batch_tokens=2 * LENGTH, original=True, single=True)
    for index in range(2):
        block = block_of(model, index)
        solved: list[str] = []

        def solve(
            stats: Mapping[str, ActStats],
            index: int = index,
            block: Block = block,
            solved: list[str] = solved,
        ) -> None:
            seen = inputs_of(model.module, model, ids)  # with all that was solved so far
            assert len({id(value) for value in stats.values()}) == 1
            for path, stat in stats.items():
                full = f"{model.family.blocks}.{index}.{path}"
                x, y = seen[full], untouched[full]
                assert stat.tokens == ids.numel()
                near(stat.second_moment, x.T @ x / len(x), float(x.abs().max()) ** 2)
                size = float(x.abs().max() * y.abs().max())
                near(stat.cross_moment, y.T @ x / len(x), size)
            for path in stats:
                block.linears[path].weight.mul_(0.75)
                solved.append(path)

        advance_in_lockstep(runner, block, KINDS, solve)
        assert sorted(solved) == sorted(block.linears)
    assert not any(m._forward_pre_hooks for m in model.module.modules())


def test_hidden_states_end_behind_the_solved_block() -> None:
    model, ids = tiny(seed=2), token_ids(5, LENGTH)
    runner = BlockRunner(model, ids, 2 * LENGTH, single=True)

    def solve(stats: Mapping[str, ActStats]) -> None:
        for path in stats:
            block_of(model).linears[path].weight.mul_(0.75)

    apart = BlockRunner(model, ids, 2 * LENGTH)
    advance_in_lockstep(runner, block_of(model), ["second_moment"], solve)
    apart.advance(block_of(model))  # whose weights are solved by now
    for mine, wanted in zip(runner.hidden, apart.hidden, strict=True):
        assert torch.equal(mine, wanted)


def test_linears_that_read_one_tensor_are_solved_together() -> None:
    model = tiny()
    runner = BlockRunner(model, token_ids(5, LENGTH), 2 * LENGTH, single=True)
    groups: list[list[str]] = []
    advance_in_lockstep(
        runner, block_of(model), ["second_moment"], lambda stats: groups.append(list(stats))
    )
    q, k, v, o = (f"self_attn.{name}_proj" for name in "qkvo")
    assert groups == [[q, k, v], [o], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    assert shared_leaders(runner, block_of(model, 1))[k] == q


def test_a_linear_that_never_runs_is_named() -> None:
    model = tiny(GENERIC)
    model.module.transformer.h[0].spare = nn.Linear(4, 4)
    runner = BlockRunner(model, token_ids(2, 16), single=True)
    with pytest.raises(ModelError, match="block 0 never calls spare"):
        advance_in_lockstep(runner, block_of(model), ["second_moment"], lambda stats: None)


def test_an_error_leaves_nothing_behind() -> None:
    """Batches that wait are unwound, hooks removed, and the model's modes are as before."""
    model, ids = tiny(), token_ids(6, 16)
    runner = BlockRunner(model, ids, 32, single=True)
    before = [hidden.clone() for hidden in runner.hidden]
    unwound = []
    forward = block_of(model).module.mlp.forward

    def watched(*args: Tensor) -> Tensor:
        try:
            return forward(*args)
        except BaseException as reason:
            unwound.append(type(reason).__name__)
            raise

    block_of(model).module.mlp.forward = watched

    def fail(stats: Mapping[str, ActStats]) -> None:
        if "mlp.down_proj" in stats:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        advance_in_lockstep(runner, block_of(model), ["second_moment"], fail)
    assert unwound == ["GreenletExit"] * 3
    assert all(torch.equal(a, b) for a, b in zip(before, runner.hidden, strict=True))
    assert not any(m._forward_pre_hooks for m in model.module.modules())
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


def test_solving_runs_outside_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches compute in bfloat16 and round what they multiply; the arithmetic does not."""
    monkeypatch.setattr("quantlab.texts.fast_bfloat16", lambda: True)
    model, ids = tiny(seed=1), token_ids(4, LENGTH)
    runner = BlockRunner(model, ids, 2 * LENGTH, original=True, single=True)
    exact = inputs_of(model.module, model, ids)

    def solve(stats: Mapping[str, ActStats]) -> None:
        assert not torch.is_autocast_enabled("cpu")
        for path, stat in stats.items():
            x = exact[f"model.layers.0.{path}"]
            wanted = x.T @ x / len(x)
            for moment in (stat.second_moment, stat.cross_moment):
                assert moment is not None
                assert moment.dtype == torch.float32
                # bfloat16 has 8 bits of mantissa; errors of single products mostly cancel.
                assert 0 < float((moment - wanted).norm() / wanted.norm()) < 0.02

    advance_in_lockstep(runner, block_of(model), KINDS, solve)
    assert all(hidden.dtype == torch.float32 for hidden in runner.hidden)


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if one.sequential])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sequential_methods_may_be_called_input_by_input(family: str, name: str) -> None:
    """On the same statistics, parts of a block give what the whole block gives."""
    method, config = METHODS[name], configure(parse_variant(f"{name}:4"), 32)
    ids = token_ids(4, LENGTH)
    whole = method.quantize_block(
        block_of(tiny(family)),
        BlockRunner(tiny(family), ids).collect(block_of(tiny(family)), method.needs_for(config)),
        config,
    )
    first = next(iter(whole))
    model = tiny(family)
    packed: dict[str, PackedWeight] = quantize_blocks(model, method, config, ids, lambda *_: None)
    # What the first input's linears read depends on no other linear of the block.
    path = f"{model.family.blocks}.0.{first}"
    assert torch.equal(packed[path].dequantize(), whole[first].dequantize())
    later = list(whole)[-1]
    path = f"{model.family.blocks}.0.{later}"
    assert not torch.equal(packed[path].dequantize(), whole[later].dequantize())
