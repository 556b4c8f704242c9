"""EfficientQAT and QAT on tiny models, Block-AP on the bundled one, and resuming after a kill."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantlab.blockwise import train_blocks
from quantlab.calibration import BlockRunner
from quantlab.errors import ConfigError, MethodError
from quantlab.layers import QuantLinear
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.methods.efficientqat import freeze_block
from quantlab.models import LoadedModel, block_list, load
from quantlab.packing import AffineWeight, PackedWeight, unpack_bits
from quantlab.training.loops import Rates, train_block
from quantlab.training.start import begin, install
from quantlab.training.workshop import Workshop
from tests.tiny import GENERIC, block_of, logits, tiny, token_ids

GROUP = 32
IDS = token_ids(12, 32)


def quiet(stage: str, done: int, total: int) -> None:
    """Nobody watches."""


def trained(
    text: str, folder: Path | None = None, model: LoadedModel | None = None, seed: int = 0
) -> tuple[LoadedModel, dict[str, PackedWeight], Workshop]:
    model = tiny("llama") if model is None else model
    spec, workshop = parse_variant(text), Workshop(folder, quiet, seed)
    packed = train_blocks(model, METHODS[spec.method], configure(spec, GROUP), IDS, workshop)
    return model, packed, workshop


def codes_of(weight: PackedWeight) -> Tensor:
    assert isinstance(weight, AffineWeight)
    return unpack_bits(weight.codes, weight.bits, weight.columns)


@torch.no_grad()
def output_error(
    model: LoadedModel, method: str, bits: int, ids: Tensor, rates: Rates, group: int = GROUP
) -> float:
    """Relative error of block 0's output after `method`; 'trained' is Block-AP from its start."""
    block = block_of(model)
    runner = BlockRunner(model, ids, batch_tokens=2 * ids.shape[1])
    targets = [runner.run(block, hidden).float() for hidden in runner.hidden]
    stats = dict(runner.collect(block, ("second_moment",)))
    if method == "trained":
        linears = begin(block, stats, bits, group, compensate=True)
        install(block, linears)
        train_block(
            block.module, lambda x: runner.run(block, x), runner.hidden, targets, rates, 3, 0,
            lambda step: None,
        )  # fmt: skip
        freeze_block(block, linears)
    else:
        # In the first block there is no earlier error for GPTAQ to answer for.
        plain = ":gptaq=never" if method == "gptq" else ""
        config = configure(parse_variant(f"{method}:{bits}{plain}"), group)
        weights = METHODS[method].quantize_block(block, stats, config)
        for path, weight in weights.items():
            block.linears[path].weight.copy_(weight.dequantize())
    wrong = sum(
        float((runner.run(block, hidden) - target).square().sum())
        for hidden, target in zip(runner.hidden, targets, strict=True)
    )
    return wrong / sum(float(target.square().sum()) for target in targets)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("bits", [2, 3])
def test_block_ap_lowers_the_block_s_error_below_rounding_and_gptq(bits: int) -> None:
    rates = Rates(0.02, 0.01, 0.01, 0.002)
    errors = {
        method: output_error(tiny("llama"), method, bits, IDS, rates)
        for method in ("rtn", "gptq", "efficientqat", "trained")
    }
    assert errors["trained"] < 0.95 * errors["gptq"] < errors["gptq"] < errors["rtn"]
    assert errors["efficientqat"] < 1.1 * errors["gptq"]  # untrained: GPTQ by another road


@pytest.mark.usefixtures("exact")
def test_e2e_qp_changes_the_steps_and_nothing_else() -> None:
    options = "efficientqat:3:block_epochs=1:batch_size=2"
    before = trained(f"{options}:e2e_epochs=0")[1]
    model, after, workshop = trained(f"{options}:e2e_epochs=2:e2e_rate=0.01")
    moved = 0
    for path, weight in after.items():
        other = before[path]
        assert isinstance(weight, AffineWeight)
        assert isinstance(other, AffineWeight)
        assert torch.equal(weight.codes, other.codes)
        assert weight.zeros is not None
        assert other.zeros is not None
        assert torch.equal(weight.zeros, other.zeros)
        moved += int(not torch.equal(weight.scales, other.scales))
    assert moved == len(after)
    losses = workshop.curves["e2e_qp"][0]
    assert len(losses) == 12
    assert sum(losses[-6:]) < sum(losses[:6])
    assert [len(losses) for losses in workshop.curves["block_ap"]] == [6, 6]
    assert not [p for p in model.module.parameters() if p.requires_grad]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("goal", ["original", "text"])
def test_training_brings_the_model_nearer_to_its_goal(goal: str) -> None:
    """Against the same bits without training, on the calibration text."""
    ids = IDS[:, :-1]

    def loss(model: LoadedModel) -> float:
        found = logits(model.module, ids).log_softmax(-1)
        if goal == "text":
            return -float(found.gather(2, IDS[:, 1:, None]).mean())
        target = logits(tiny("llama").module, ids).log_softmax(-1)
        return float((target.exp() * (target - found)).sum(-1).mean())

    base = f"efficientqat:2:goal={goal}:batch_size=2"
    untrained = loss(trained(f"{base}:block_epochs=0:e2e_epochs=0")[0])
    blocks = loss(trained(f"{base}:block_epochs=3:e2e_epochs=0")[0])
    both = loss(trained(f"{base}:block_epochs=3:e2e_epochs=3:e2e_rate=0.01")[0])
    assert both < blocks
    assert both < untrained
    plain = f"qat:3:goal={goal}:batch_size=2"
    assert loss(trained(f"{plain}:epochs=3:rate=0.02")[0]) < loss(trained(f"{plain}:epochs=0")[0])


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "name", ["gpt2", "opt", "opt-post", "neox", "qwen2", "gemma3", "phi3", GENERIC]
)
@pytest.mark.parametrize("text", ["efficientqat:3:block_epochs=1:e2e_epochs=1", "qat:4:epochs=1"])
def test_every_family_can_be_trained(name: str, text: str) -> None:
    model, packed, _ = trained(text, model=tiny(name, width=48))
    original = tiny(name, width=48)
    assert len(packed) == len(block_list(model.module, model.family)) * len(
        block_of(original).linears
    )
    for path, weight in packed.items():
        layer = model.module.get_submodule(path)
        assert isinstance(layer, QuantLinear)
        source = original.module.get_submodule(path)
        assert weight.shape == tuple(source.weight.shape)
        assert (layer.bias is None) == (source.bias is None)
    after, before = logits(model.module, IDS), logits(original.module, IDS)
    assert float((after - before).norm() / before.norm()) < 0.6


class Stopped(Exception):
    """What a cancel looks like from inside."""


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("text", ["efficientqat:2:block_epochs=1:e2e_epochs=4:batch_size=2",
                                  "qat:3:epochs=8:batch_size=2"])  # fmt: skip
def test_a_training_goes_on_where_it_was_stopped(text: str, tmp_path: Path) -> None:
    """Stopped at any moment, the weights and curves in the end are bit for bit the same."""
    spec = parse_variant(text)
    stages: list[tuple[str, int, int]] = []
    whole = Workshop(None, lambda *stage: stages.append(stage))
    wanted = train_blocks(tiny("llama"), METHODS[spec.method], configure(spec, GROUP), IDS, whole)
    for count, stop in enumerate([3, len(stages) // 2, len(stages) - 2]):
        folder = tmp_path / str(count)
        seen = 0

        def report(stage: str, done: int, total: int, stop: int = stop) -> None:
            nonlocal seen
            seen += 1
            if seen > stop:
                raise Stopped

        stopped = Workshop(folder, report)
        with pytest.raises(Stopped):
            train_blocks(tiny("llama"), METHODS[spec.method], configure(spec, GROUP), IDS, stopped)
        made = 0

        def count_steps(stage: str, done: int, total: int) -> None:
            nonlocal made
            made += 1

        again = Workshop(folder, count_steps)
        found = train_blocks(
            tiny("llama"), METHODS[spec.method], configure(spec, GROUP), IDS, again
        )
        assert again.curves == whole.curves
        if count == 2:
            assert made < len(stages) - 2, "steps were made twice"
            assert again.earlier_seconds > 0
        for path, weight in wanted.items():
            for name, tensor in weight.tensors().items():
                assert torch.equal(tensor, found[path].tensors()[name]), (path, name)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.methods.test_efficientqat import trained
import tests.methods.test_efficientqat as own
import quantlab.texts
quantlab.texts.fast_bfloat16 = lambda: False
def quiet(stage, done, total):
    if stage == "e2e_qp" and done == 10:
        os.kill(os.getpid(), signal.SIGKILL)
own.quiet = quiet
trained(sys.argv[3], Path(sys.argv[1]))
"""


@pytest.mark.usefixtures("exact")
def test_a_killed_process_is_gone_on_from(tmp_path: Path) -> None:
    text = "efficientqat:2:block_epochs=1:e2e_epochs=2:batch_size=2"
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "w"), str(root), text], cwd=root, timeout=120
    )
    assert ended.returncode == -9
    assert (tmp_path / "w" / "block-001.safetensors").is_file()
    assert (tmp_path / "w" / "e2e_qp.safetensors").is_file()
    assert not list((tmp_path / "w").glob("*.partial"))
    _, wanted, _ = trained(text)
    _, found, workshop = trained(text, tmp_path / "w")
    assert workshop.earlier_seconds > 0
    for path, weight in wanted.items():
        for name, tensor in weight.tensors().items():
            assert torch.equal(tensor, found[path].tensors()[name])


@pytest.mark.usefixtures("exact")
def test_another_seed_takes_the_batches_in_another_order() -> None:
    text = "efficientqat:2:block_epochs=1:e2e_epochs=0:batch_size=2"
    path = "model.layers.0.mlp.up_proj"
    first, second = trained(text)[1][path], trained(text, seed=5)[1][path]
    assert not torch.equal(codes_of(first), codes_of(second))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("efficientqat:5", "has no 5 bits; choose 2, 3, 4"),
        ("qat:8", "has no 8 bits"),
        ("efficientqat:2:goal=both", "choose one of original, text"),
        ("efficientqat:2:start=random", "choose one of compensated, rounded"),
        ("efficientqat:2:block_rate=-0.1", "needs at least 0"),
        ("efficientqat:2:batch_size=0", "needs at least 1"),
        ("efficientqat:2:block_epochs=0:e2e_epochs=0:block_rate=2", "needs at most 1"),
        ("qat:4:epochs=101", "needs at most 100"),
    ],
)
def test_refusals(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_variant(text)


@pytest.mark.usefixtures("exact")
def test_weights_that_are_not_finite_are_refused_before_training() -> None:
    model = tiny("llama")
    with torch.no_grad():
        block_of(model, 1).linears["mlp.up_proj"].weight[0, 0] = torch.nan
    with pytest.raises(MethodError, match=r"block 1: the weights of mlp\.up_proj are not finite"):
        trained("efficientqat:2", model=model)


def test_the_paper_s_claim_on_the_bundled_model_s_first_block() -> None:
    """A few steps of Block-AP leave less error in the block's output than GPTQ at the same bits."""
    from quantlab.texts import calibration_ids

    errors = {}
    for method in ("gptq", "trained"):
        model = load("bundled")
        ids, _ = calibration_ids(model, "project", 8 * 256, 256, 0, lambda event: None)
        errors[method] = output_error(model, method, 2, ids, Rates(0.01, 0.005, 0.005, 0.0005), 64)
    assert errors["trained"] < 0.85 * errors["gptq"]
