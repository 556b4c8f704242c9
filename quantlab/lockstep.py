"""One forward pass of a block instead of two: batches wait for each other at every linear.

A method that compensates for the error made so far wants a linear's input as it is behind the
quantized linears before it. That input must be seen on all calibration tokens before the linear can
be quantized, and no token can go on before that. So all batches run through the block in lockstep:

    each batch runs until a linear is about to read its input, and waits there;
    when all have arrived, the statistics of that input are complete: the linears that read it are
    quantized, and the batches go on through the quantized weights to the next input;
    what leaves the block is the next block's input.

This is the order of GPTQ's authors (their code calls it true-sequential), at one pass, where
collecting the statistics first and running the quantized block afterwards takes two.

A forward pass is one Python call that cannot be left and entered again, unless it has a stack of
its own: a greenlet. Greenlets take turns on one thread, where `switch` says so and nowhere else.
Torch sees that one thread: its pool of workers and its modes (no_grad, autocast) are shared by all
greenlets, so that no mode may be entered in one greenlet and left while another one runs. Here they
are entered around `switch`.
Source of the order: Frantar et al. 2022, arXiv 2210.17323, and its authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from quantlab.calibration import (
    Accumulator,
    ActStats,
    BlockRunner,
    StatKind,
    check_all_ran,
)
from quantlab.models import Block
from quantlab.moments import multiplies_bfloat16
from quantlab.texts import calibration_autocast

Solve = Callable[[Mapping[str, ActStats]], None]
"""Quantizes the linears of these paths, which all read the one input that the statistics describe,
and leaves in their weights what the batches are to go on through."""


@torch.no_grad()
def advance_in_lockstep(
    runner: BlockRunner, block: Block, kinds: Iterable[StatKind], solve: Solve
) -> None:
    """Quantize the block input by input, and move the runner's hidden states behind it.

    `runner` needs `single=True`; with 'cross_moment' among `kinds`, its original stream passes the
    unquantized block first and goes on as well. Raises: ModelError for a linear that never runs.
    """
    wanted = frozenset(kinds)
    leaders = shared_leaders(runner, block)
    originals: list[dict[str, Tensor]] = [{} for _ in runner.hidden]
    if "cross_moment" in wanted:
        originals = _pass_originals(runner, block, leaders)
    sums: dict[str, Accumulator] = {}
    solved: set[str] = set()
    driver = getcurrent()

    def arrive(path: str, inputs: Tensor) -> None:
        leader = leaders.setdefault(path, path)
        if leader not in solved:
            driver.switch((leader, inputs))

    batches = [greenlet(runner.call) for _ in runner.hidden]
    outputs: dict[int, Tensor] = {}
    waiting: dict[int, str] = {}

    def go_on(index: int, *call: Any) -> None:
        """Let a batch run until it waits at an input that nothing is known of, or is done."""
        with calibration_autocast():
            answer = batches[index].switch(*call)
            if batches[index].dead:
                outputs[index] = answer.float()
                return
            leader, inputs = answer
            waiting[index] = leader
            total = sums.setdefault(leader, Accumulator(wanted, runner.tokens))
            total.add(inputs, originals[index].pop(leader, None))

    try:
        with runner.listening(block, arrive):
            for index, hidden in enumerate(runner.hidden):
                go_on(index, block, hidden)
            while waiting:
                # All wait at the same input, unless one of them skipped some linears; what comes
                # first in the block is then complete, for no batch is still before it.
                leader = min(waiting.values(), key=list(leaders).index)
                solve(dict.fromkeys(_members(leaders, leader), sums.pop(leader).result()))
                solved.add(leader)
                for index in [i for i, place in waiting.items() if place == leader]:
                    del waiting[index]
                    go_on(index)
    finally:
        for batch in batches:
            batch.throw()  # Unwinds what still waits after an error; the dead do not mind.
    check_all_ran(block, leaders)
    runner.hidden = [outputs[index] for index in range(len(batches))]


def shared_leaders(runner: BlockRunner, block: Block) -> dict[str, str]:
    """Each linear's path -> the first linear that reads the same tensor, in the order they run;
    seen on one piece, before any batch starts."""
    seen: list[tuple[Tensor, str]] = []
    leaders: dict[str, str] = {}

    def note(path: str, inputs: Tensor) -> None:
        first = next((first for tensor, first in seen if tensor is inputs), path)
        seen.append((inputs, first))
        leaders.setdefault(path, first)

    runner.run(block, runner.hidden[0][:1], note)
    return leaders


def _members(leaders: Mapping[str, str], leader: str) -> list[str]:
    return [path for path, first in leaders.items() if first == leader]


def _pass_originals(
    runner: BlockRunner, block: Block, leaders: Mapping[str, str]
) -> list[dict[str, Tensor]]:
    """Move the original stream behind the block: what each leading linear read, by batch. Kept as
    it is multiplied, in bfloat16 where linears round to that."""
    assert runner.original is not None, "needs original=True"
    kept: list[dict[str, Tensor]] = []
    outputs: list[Tensor] = []
    for hidden in runner.original:
        inputs: dict[str, Tensor] = {}

        def keep(path: str, x: Tensor, inputs: dict[str, Tensor] = inputs) -> None:
            if leaders.get(path, path) == path:
                inputs.setdefault(path, x.bfloat16() if multiplies_bfloat16() else x)

        outputs.append(runner.run(block, hidden, keep).float())
        kept.append(inputs)
    runner.original = outputs
    return kept
