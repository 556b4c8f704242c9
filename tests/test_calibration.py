"""Streamed statistics against recording every input of the whole model at once in float64."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from quantlab.calibration import (
    SAMPLE_ROWS,
    Accumulator,
    ActStats,
    BlockRunner,
    StatKind,
)
from quantlab.errors import ModelError
from quantlab.models import LoadedModel, block_list
from quantlab.models.loading import prepare_module
from tests.tiny import (
    CONTEXT,
    FAMILIES,
    GENERIC,
    VOCABULARY,
    block_of,
    randomize,
    recorded_inputs,
    tiny,
    token_ids,
)

pytestmark = pytest.mark.usefixtures("exact")

KINDS: tuple[StatKind, ...] = get_args(StatKind)
LENGTH = 24


@torch.no_grad()
def naive(model: LoadedModel, ids: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(every linear's input, float64 [tokens, columns], by full path; each block's output) from
    one forward pass over all pieces at once, in double precision."""
    module = copy.deepcopy(model.module).double()
    outputs: list[Tensor] = []

    def keep(_: nn.Module, args: object, output: object) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in block_list(module, model.family)]
    with recorded_inputs(model.family, module) as seen:
        module(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(inputs) for path, inputs in seen.items()}, outputs


def near(actual: Tensor | None, wanted: Tensor, size: float) -> None:
    """Within float32 rounding of numbers of this size, a few operations deep."""
    assert actual is not None
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=2e-5 * size)


@pytest.mark.parametrize(("pieces", "per_batch"), [(6, 3), (6, 6), (5, 2), (8, 3), (1, 4)])
@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_are_those_of_the_whole_data(name: str, pieces: int, per_batch: int) -> None:
    """Also where the last batch is smaller than the others."""
    model, ids = tiny(name, seed=1), token_ids(pieces, LENGTH)
    inputs, outputs = naive(model, ids)
    runner = BlockRunner(model, ids, batch_tokens=per_batch * LENGTH, original=True)
    for index in range(2):
        block = block_of(model, index)
        stats = runner.collect(block, KINDS)
        assert stats.keys() == block.linears.keys()
        for path, stat in stats.items():
            x = inputs[f"{model.family.blocks}.{index}.{path}"]
            size = float(x.abs().max())
            assert stat.tokens == len(x) == ids.numel()
            near(stat.second_moment, x.T @ x / len(x), size**2)
            near(stat.low, x.amin(0), size)
            near(stat.high, x.amax(0), size)
            near(stat.max_abs, x.abs().amax(0), size)
            near(stat.mean_abs, x.abs().mean(0), size)
            near(stat.sample, x, size)  # fewer than 256 tokens: all of them
            near(stat.mean_square, x.square().mean(0), size**2)
            near(stat.cross_moment, x.T @ x / len(x), size**2)  # nothing is quantized yet
        runner.advance(block)
        near(torch.cat(runner.hidden), outputs[index], float(outputs[index].abs().max()))


def alternating() -> LoadedModel:
    """A Qwen2 whose second block sees 8 tokens back and whose first sees all."""
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        use_sliding_window=True, sliding_window=8, max_window_layers=1,
    )  # fmt: skip
    module = prepare_module(Qwen2ForCausalLM(config))
    randomize(module, 3)
    return dataclasses.replace(tiny("qwen2"), module=module)


def eager() -> LoadedModel:
    """A GPT-2 that reads its mask, which it passes to its blocks without a name."""
    model = tiny("gpt2", seed=3)
    model.module.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("make", [alternating, eager])
def test_every_block_gets_the_mask_the_model_gives_it(make: Callable[[], LoadedModel]) -> None:
    model, ids = make(), token_ids(5, LENGTH)
    _, outputs = naive(model, ids)
    runner = BlockRunner(model, ids, batch_tokens=2 * LENGTH)
    for index in range(2):
        runner.advance(block_of(model, index))
        near(torch.cat(runner.hidden), outputs[index], float(outputs[index].abs().max()))


@pytest.mark.parametrize(("pieces", "length"), [(11, 32), (8, 64), (32, 8), (3, 100), (37, 7)])
def test_samples_are_evenly_spaced_over_all_batches(pieces: int, length: int) -> None:
    model, ids = tiny(), token_ids(pieces, length)
    x = naive(model, ids)[0]["model.layers.0.mlp.down_proj"]
    stats = BlockRunner(model, ids, batch_tokens=3 * length).collect(block_of(model), ["sample"])
    sample = stats["mlp.down_proj"].sample
    assert sample is not None
    assert SAMPLE_ROWS / 2 < len(sample) <= SAMPLE_ROWS or len(sample) == len(x) <= SAMPLE_ROWS
    stride = -(-len(x) // SAMPLE_ROWS)
    near(sample, x[::stride], float(x.abs().max()))


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama", [3, 1, 2, 1]),
        ("mistral", [3, 1, 2, 1]),
        ("qwen2", [3, 1, 2, 1]),
        ("gpt2", [1, 1, 1, 1]),
        ("opt", [3, 1, 1, 1]),
        ("neox", [1, 1, 1, 1]),
    ],
)
def test_linears_with_one_input_share_one_object(name: str, groups: list[int]) -> None:
    model = tiny(name)
    runner = BlockRunner(model, token_ids(3, 16), 32, original=True)
    stats = runner.collect(block_of(model), KINDS)
    shared: dict[int, list[str]] = {}
    for path, stat in stats.items():
        shared.setdefault(id(stat), []).append(path)
    assert sorted(map(len, shared.values())) == sorted(groups)
    if name == "llama":
        assert stats["self_attn.q_proj"] is stats["self_attn.v_proj"]
        assert stats["mlp.gate_proj"] is stats["mlp.up_proj"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_asked_for_is_kept(kind: StatKind) -> None:
    model = tiny()
    runner = BlockRunner(model, token_ids(2, 16), original=True)
    stats = runner.collect(block_of(model), [kind])
    fields = {field.name for field in dataclasses.fields(ActStats)} - {"tokens"}
    wanted = {"range": {"low", "high"}, "mean": {"mean_abs"}, "square": {"mean_square"}}.get(
        kind, {kind}
    )
    for stat in stats.values():
        assert {field for field in fields if getattr(stat, field) is not None} == wanted


def test_collecting_changes_nothing() -> None:
    model = tiny()
    runner = BlockRunner(model, token_ids(3, 16), 32, original=True)
    before = [hidden.clone() for hidden in runner.hidden]
    first = runner.collect(block_of(model), KINDS)
    again = runner.collect(block_of(model), KINDS)
    for path, stat in first.items():
        assert torch.equal(stat.second_moment, again[path].second_moment)
        assert torch.equal(stat.cross_moment, again[path].cross_moment)
    assert all(torch.equal(a, b) for a, b in zip(before, runner.hidden, strict=True))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.module.modules())


def test_later_blocks_see_what_was_done_to_earlier_ones() -> None:
    model, ids = tiny(seed=2), token_ids(4, LENGTH)
    untouched, _ = naive(model, ids)
    runner = BlockRunner(model, ids, 2 * LENGTH)
    block = block_of(model)
    block.linears["mlp.down_proj"].weight.mul_(1.5)
    runner.advance(block)
    changed, _ = naive(model, ids)
    stats = runner.collect(block_of(model, 1), ["mean"])
    path = "model.layers.1.self_attn.q_proj"
    wanted = changed[path].abs().mean(0)
    near(stats["self_attn.q_proj"].mean_abs, wanted, 1)
    assert float((wanted - untouched[path].abs().mean(0)).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_cross_moments_pair_both_streams_at_every_token(name: str) -> None:
    """Two blocks are changed one after the other: the original stream must pass both as they
    were, the other one as they are."""
    model, ids = tiny(name, seed=2, blocks=3), token_ids(5, LENGTH)
    untouched, _ = naive(model, ids)
    runner = BlockRunner(model, ids, 2 * LENGTH, original=True)
    for index in range(3):
        block = block_of(model, index)
        stats = runner.collect(block, ["cross_moment", "second_moment"])
        seen, _ = naive(model, ids)
        for path, stat in stats.items():
            full = f"{model.family.blocks}.{index}.{path}"
            x, y = seen[full], untouched[full]
            size = float(x.abs().max() * y.abs().max())
            near(stat.cross_moment, y.T @ x / len(x), size)
            assert stat.cross_moment is not None
            assert stat.second_moment is not None
            apart = float((stat.cross_moment - stat.second_moment).abs().max())
            assert apart > 1e-3 * size if index else apart < 1e-5 * size
        for linear in block.linears.values():
            linear.weight.mul_(1.3)
        runner.advance(block)


def test_one_pass_can_collect_and_advance() -> None:
    model, ids = tiny(seed=2), token_ids(5, LENGTH)
    both, apart = (BlockRunner(model, ids, 2 * LENGTH) for _ in range(2))
    stats = both.collect(block_of(model), ["square"], advance=True)
    assert both.tokens == stats["mlp.down_proj"].tokens == ids.numel()
    apart.advance(block_of(model))
    assert all(torch.equal(a, b) for a, b in zip(both.hidden, apart.hidden, strict=True))


def test_cross_moments_need_the_original_stream() -> None:
    with pytest.raises(AssertionError, match="original=True"):
        BlockRunner(tiny(), token_ids(2, 16)).collect(block_of(tiny()), ["cross_moment"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_show_in_every_statistic(bad: float) -> None:
    model = tiny()
    model.module.model.layers[0].input_layernorm.weight[5] = bad
    runner = BlockRunner(model, token_ids(2, 16), original=True)
    stat = runner.collect(block_of(model), KINDS)["self_attn.q_proj"]
    for tensor in (
        stat.second_moment, stat.max_abs, stat.mean_abs, stat.sample, stat.mean_square,
        stat.cross_moment,
    ):  # fmt: skip
        assert tensor is not None
        assert not bool(torch.isfinite(tensor).all())


def test_bfloat16_products_stay_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU has them, matrix products run in bfloat16 (8 bits of mantissa), and the
    statistics themselves in float32."""
    monkeypatch.setattr("quantlab.texts.fast_bfloat16", lambda: True)
    model, ids = tiny(seed=1), token_ids(5, LENGTH)
    inputs, _ = naive(model, ids)
    runner = BlockRunner(model, ids, 2 * LENGTH, original=True)
    for index in range(2):
        block = block_of(model, index)
        for path, stat in runner.collect(block, KINDS).items():
            x = inputs[f"{model.family.blocks}.{index}.{path}"]
            moment = stat.second_moment
            assert moment is not None
            assert moment.dtype == torch.float32
            wanted = x.T @ x / len(x)
            assert float((moment - wanted).norm() / wanted.norm()) < 0.02
        runner.advance(block)
        assert all(hidden.dtype == torch.float32 for hidden in runner.hidden)


def test_a_linear_that_never_runs_is_named() -> None:
    model = tiny(GENERIC)
    model.module.transformer.h[0].spare = nn.Linear(4, 4)
    runner = BlockRunner(model, token_ids(2, 16))
    with pytest.raises(ModelError, match="block 0 never calls spare"):
        runner.collect(block_of(model), ["mean"])


def test_the_largest_magnitude_is_of_either_sign() -> None:
    stats = ActStats(1, low=torch.tensor([-3.0, 1.0]), high=torch.tensor([2.0, 4.0]))
    assert stats.max_abs.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("strip", [1, 7, 20, 256])
def test_the_second_moment_is_whole_and_symmetric_whatever_the_strips(
    strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantlab.moments.STRIP", strip)
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(3))
    sums = Accumulator(frozenset({"second_moment"}), 1)
    for batch in x.split(16):
        sums.add(batch)
    moment = sums.result().second_moment
    near(moment, x.double().t() @ x.double() / 50, 1.0)
    assert moment is not None
    assert torch.equal(moment, moment.t())


def test_collecting_stops_a_pass_at_the_last_linear() -> None:
    """Every pass but the first spares the last linear itself, and loses no input."""
    model = tiny("llama")
    runner = BlockRunner(model, token_ids(4, LENGTH), batch_tokens=LENGTH)
    block = block_of(model, 0)
    last = block.linears[list(block.linears)[-1]]
    ran = 0

    def count(*_: object) -> None:
        nonlocal ran
        ran += 1

    handle = last.register_forward_hook(count)
    stats = runner.collect(block, ["second_moment", "range", "sample"])
    handle.remove()
    assert ran == 1
    assert {value.tokens for value in stats.values()} == {4 * LENGTH}
