"""Blocks in five native steps, against transformers' modules in float64.

The module is run on the numbers that the native block handed to its linears (bfloat16), so that no
rounding of an earlier step counts twice; what it would have handed on itself must then be those
numbers before they were rounded:

    |native - module| <= 2^-8 |module| + 2^-12 max |module|

a unit of bfloat16 (twice its half, for sums that fall on the other side of a tie), and what float32
and attention's 16 bits of fraction make of numbers as large as the largest beside them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import build
from quantlab.calibration import BlockRunner
from quantlab.layers import QuantLinear, replace_linear
from quantlab.methods import METHODS
from quantlab.models import Block, LoadedModel, get_block
from quantlab.native_blocks import NativeBlocks, native_blocks
from quantlab.native_records import FAMILIES, PATHS
from quantlab.texts import calibration_autocast
from tests.tiny import block_of, tiny, token_ids

LENGTH = 24
NAMES = [family.removesuffix("_text") for family in FAMILIES]

pytestmark = pytest.mark.skipif(
    not build.supported()[0].multiplies_bfloat16, reason="this CPU multiplies no bfloat16"
)


def wide(linear: nn.Linear) -> nn.Linear:
    """The linear in float64, its weight rounded to bfloat16."""
    copied = copy.deepcopy(linear).double()
    copied.weight.copy_(linear.weight.bfloat16().double())
    return copied


def oracle(
    runner: BlockRunner, block: Block, hidden: Tensor, given: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """What each linear would have read, and the block's output, when linears read what is given."""
    module = copy.deepcopy(block.module).double()
    seen: dict[str, Tensor] = {}
    for path, linear in block.linears.items():
        replaced = wide(linear)

        def read(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> tuple[Tensor, ...]:
            seen[path] = args[0]
            return (given[path].double(),)

        replaced.register_forward_pre_hook(read)
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, replaced)
    keywords = runner._by_size[hidden.shape[0]][block.index]
    output = module(hidden.double(), **{name: in_double(value) for name, value in keywords.items()})
    return seen, output[0] if isinstance(output, tuple) else output


def in_double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(in_double(part) for part in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def native_run(
    runner: BlockRunner, block: Block, hidden: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    seen: dict[str, Tensor] = {}
    output = runner.run(block, hidden, seen.__setitem__)
    assert set(seen) == set(PATHS.values())
    assert all(x.dtype == torch.bfloat16 for x in seen.values()), "torch ran it"
    return seen, output


def prepared(name: str, pieces: int = 3) -> tuple[LoadedModel, BlockRunner]:
    model = tiny(name, seed=4)
    return model, BlockRunner(model, token_ids(pieces, LENGTH, seed=1), 2 * LENGTH, single=True)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_step_is_what_the_module_computes(name: str) -> None:
    model, runner = prepared(name)
    for index in range(2):
        block = get_block(model.module, model.family, index)
        for hidden in list(runner.hidden):  # a batch of two pieces, and a lone one
            before = hidden.clone()
            given, output = native_run(runner, block, hidden)
            assert torch.equal(hidden, before)
            seen, wanted = oracle(runner, block, hidden, given)
            for path, x in seen.items():
                allowed = x.abs() * 2**-8 + x.abs().max() * 2**-12
                assert ((given[path].double() - x).abs() <= allowed).all(), path
            # Nothing is rounded behind the last linear.
            assert (output.double() - wanted).abs().max() <= 2**-14 * wanted.abs().max()
        runner.advance(block)


@torch.no_grad()
def test_linears_that_read_together_get_one_tensor() -> None:
    model, runner = prepared("llama")
    given, _ = native_run(runner, block_of(model), runner.hidden[0])
    assert given["self_attn.q_proj"] is given["self_attn.v_proj"]
    assert given["mlp.gate_proj"] is given["mlp.up_proj"]


@torch.no_grad()
def test_a_weight_that_the_hook_changes_is_multiplied_as_it_is_then() -> None:
    model, runner = prepared("llama")
    block, hidden = block_of(model), runner.hidden[0]
    given, output = native_run(runner, block, hidden)

    def silence(path: str, inputs: Tensor) -> None:
        if path == "mlp.down_proj":
            block.linears[path].weight.zero_()

    silenced = runner.run(block, hidden, silence)
    down = given["mlp.down_proj"].double() @ wide_down(model)
    torch.testing.assert_close(output - silenced, down.float(), rtol=1e-3, atol=1e-5)
    assert torch.equal(runner.run(block, hidden), silenced)  # the change stays seen


def wide_down(model: LoadedModel) -> Tensor:
    """The down-projection's weight before anybody changed it, transposed."""
    fresh = block_of(tiny("llama", seed=4)).linears["mlp.down_proj"]
    return fresh.weight.bfloat16().double().t()


def test_who_is_not_taken() -> None:
    """Gradients, quantized layers, float32 arithmetic and other lengths are torch's."""
    model, runner = prepared("llama")
    native, block, hidden = runner._native, block_of(model), runner.hidden[0]
    assert isinstance(native, NativeBlocks)
    with calibration_autocast():
        assert not native.takes(block, hidden)
        with torch.no_grad():
            assert native.takes(block, hidden)
            assert not native.takes(block, hidden[:, 1:])
    with torch.no_grad():
        assert not native.takes(block, hidden)
        config = METHODS["rtn"].Config(bits=8)
        weights = METHODS["rtn"].quantize_block(block, {}, config)
        path = "mlp.up_proj"
        replace_linear(block.module, path, QuantLinear(weights[path], None))
        with calibration_autocast():
            assert not native.takes(get_block(model.module, model.family, 0), hidden)


def test_where_there_are_no_native_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_blocks(tiny("gpt2"), LENGTH) is None
    assert native_blocks(tiny("llama"), LENGTH) is not None
    for choice in ("off", "avx512"):
        monkeypatch.setenv("QUANTLAB_NATIVE", choice)
        assert native_blocks(tiny("llama"), LENGTH) is None
