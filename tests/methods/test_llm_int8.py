"""LLM.int8() against bitsandbytes, and the paper's claim on a model with massive activations."""

from __future__ import annotations

import copy
import logging
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels import reference
from quantlab.layers import QuantLinear, kernel_report, replace_linear
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.methods.llm_int8 import round_rows
from quantlab.models import LoadedModel, get_block
from quantlab.packing import OutlierWeight
from quantlab.texts import ASSETS
from tests.tiny import block_of, logits, random, recorded_inputs, tiny

BNB_SCALE = 2e-5
"""bitsandbytes multiplies its integer sums by 6.200124e-05, which is 1.000018 times 1/127^2."""


@pytest.fixture(scope="module")
def bnb() -> ModuleType:
    return pytest.importorskip("bitsandbytes")


def theirs(bnb: ModuleType, x: Tensor, weight: OutlierWeight, bias: Tensor | None) -> Tensor:
    """bitsandbytes' product of the same weight: float16 [m, rows]."""
    state = bnb.MatmulLtState()
    state.has_fp16_weights, state.is_training = False, False
    state.CB, state.SCB = weight.codes, weight.scales * 127
    half = None if bias is None else bias.half()
    y: Tensor = bnb.matmul(
        x.half(), weight.codes, bias=half, state=state, threshold=weight.threshold
    )
    return y


def close_to_bnb(got: Tensor, want: Tensor, x: Tensor, weight: OutlierWeight, u: float) -> bool:
    """`got` in a type of unit roundoff `u`, `want` in float16, both from the same codes.

    A code of the input may fall to the other side of a tie: it moves the sum by a step. Each part
    and each outlier's product is rounded, in float16 to 2^-11."""
    x, dense = x.double(), weight.dequantize().double().abs()
    inside = x.masked_fill(x.abs() >= (weight.threshold or float("inf")), 0)
    step = inside.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    scaled = inside / step
    tie = ((scaled - scaled.floor()) - 0.5).abs() <= 1e-5 * scaled.abs().clamp_min(1)
    size = x.abs() @ dense.T + step * dense.sum(1)
    limit = tie.double() @ dense.T * step + (4 * 2.0**-11 + BNB_SCALE + 4 * u) * size + 1e-3
    return bool(((got.double() - want.double()).abs() <= limit).all())


def with_outliers(rows: int, columns: int, seed: int) -> Tensor:
    """Inputs that float16 holds, with a few columns of outliers, one of them massive."""
    x = random(rows, columns, seed=seed)
    x[:, 5] *= 20
    x[0, columns // 2] = -9.0
    x[rows // 2, 7] = 3000.0
    return x.half().float()


# --- bitsandbytes ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 64), (100, 96), (576, 1536), (1, 8)])
def test_weights_as_bitsandbytes(shape: tuple[int, int], bnb: ModuleType) -> None:
    weight = random(*shape, seed=1).half()
    weight[0, 0] = 40.0
    codes, peaks, _ = bnb.functional.int8_vectorwise_quant(weight)
    ours = round_rows(weight, 6.0)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scales, peaks / 127)
    dense = bnb.functional.int8_vectorwise_dequant(codes, peaks)
    torch.testing.assert_close(ours.dequantize(), dense, rtol=2**-22, atol=0)


@pytest.mark.parametrize("threshold", [6.0, 1.5, 0.0])
@pytest.mark.parametrize("m", [1, 33])
@pytest.mark.parametrize("with_bias", [False, True])
def test_outputs_as_bitsandbytes(
    m: int, threshold: float, with_bias: bool, bnb: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    weight = round_rows(random(80, 96, seed=2).half() / 10, threshold)
    x = with_outliers(m, 96, seed=3)
    bias = random(80, seed=4).half().float() if with_bias else None
    want = theirs(bnb, x, weight, bias)
    exact = reference.outlier_linear(x, weight.codes, weight.scales, bias, threshold or 1e9)
    assert close_to_bnb(exact, want, x, weight, 0)
    for dtype, u in ((torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)):
        layer = QuantLinear(weight, bias, dtype=dtype)
        if dtype == torch.bfloat16:
            x = x.to(dtype).float()
            want = theirs(bnb, x, weight, bias)
        assert close_to_bnb(layer(x), want, x, weight, u)


@pytest.mark.xdist_group("bundled")
@pytest.mark.parametrize("index", [0, 28])
def test_a_real_block_as_bitsandbytes(
    index: int, bnb: ModuleType, bundled: LoadedModel, read: dict[str, Tensor]
) -> None:
    """Every linear on what it really reads; block 28 has the massive activation."""
    block = get_block(bundled.module, bundled.family, index)
    config = configure(parse_variant("llm_int8"))
    packed = METHODS["llm_int8"].quantize_block(block, {}, config)
    for path, weight in packed.items():
        assert isinstance(weight, OutlierWeight)
        codes, peaks, _ = bnb.functional.int8_vectorwise_quant(block.linears[path].weight.half())
        # They round the weights to float16 first, so a code may be its neighbour.
        assert int((weight.codes.int() - codes.int()).abs().max()) <= 1
        torch.testing.assert_close(weight.scales, peaks / 127, rtol=2**-10, atol=0)
        x = read[f"{bundled.family.blocks}.{index}.{path}"].to(torch.bfloat16).float()
        got = QuantLinear(weight, None, dtype=torch.float32)(x)
        assert close_to_bnb(got, theirs(bnb, x, weight, None), x, weight, 2.0**-24)


# --- the paper's claim -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ids(bundled: LoadedModel) -> Tensor:
    text = (ASSETS / "evaluation.txt").read_text(encoding="utf-8")
    return torch.tensor([bundled.tokenizer(text[:3000]).input_ids[:128]])


@pytest.fixture(scope="module")
def read(bundled: LoadedModel, ids: Tensor) -> dict[str, Tensor]:
    """What each linear of the bundled model reads, float64 [tokens, columns]."""
    with recorded_inputs(bundled.family, bundled.module) as seen:
        logits(bundled.module, ids)
    return {path: torch.cat(parts) for path, parts in seen.items()}


def divergence(bundled: LoadedModel, ids: Tensor, threshold: float) -> float:
    """Mean KL divergence from the original, with every linear in 8 bits."""
    module = copy.deepcopy(bundled.module)
    quantizer, config = METHODS["llm_int8"], configure(parse_variant("llm_int8"))
    for index in range(module.config.num_hidden_layers):
        block = get_block(module, bundled.family, index)
        for path, weight in quantizer.quantize_block(block, {}, config).items():
            assert isinstance(weight, OutlierWeight)
            weight = OutlierWeight(weight.codes, weight.scales, threshold)
            replace_linear(block.module, path, QuantLinear(weight, None, dtype=torch.float32))
    original, quantized = (
        torch.log_softmax(logits(m, ids)[0], -1) for m in (bundled.module, module)
    )
    return float((original.exp() * (original - quantized)).sum(-1).mean())


@pytest.mark.xdist_group("bundled")
def test_outlier_columns_keep_what_plain_row_wise_int8_loses(
    bundled: LoadedModel, ids: Tensor
) -> None:
    """Section 3.2 and figure 1, by divergence from the original's own predictions."""
    with_outliers, without = (divergence(bundled, ids, t) for t in (6.0, 0.0))
    assert with_outliers < 0.03
    assert without > 1.5 * with_outliers


@pytest.mark.xdist_group("bundled")
def test_the_down_projection_that_reads_the_massive_activation(
    bundled: LoadedModel, read: dict[str, Tensor]
) -> None:
    """Per token, relative to its output: one value of thousands leaves the others no codes."""
    path = f"{bundled.family.blocks}.28.mlp.down_proj"
    weight, x = bundled.module.get_submodule(path).weight.double(), read[path]
    assert float(x.abs().max()) > 1000
    wanted = x @ weight.T

    def error(threshold: float) -> float:
        packed = round_rows(weight, threshold)
        got = reference.outlier_linear(x, packed.codes, packed.scales, None, threshold)
        return float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max())

    assert error(6.0) < 0.03
    assert error(1e9) > 3 * error(6.0)


# --- the method --------------------------------------------------------------------------------


def test_rows_by_hand() -> None:
    """Each row has its own largest magnitude; ties go to the even code."""
    weight = torch.tensor(
        [[2.54, -1.27, 0.01, 0.0], [-127.0, 63.5, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0]]
    )
    packed = round_rows(weight, 6.0)
    assert packed.codes.tolist() == [[127, -64, 0, 0], [-127, 64, 0, 2], [0, 0, 0, 0]]
    assert packed.scales.tolist() == pytest.approx([0.02, 1.0, 0.0])
    assert packed.threshold == 6.0


def test_no_weight_moves_further_than_half_a_step() -> None:
    weight = random(64, 300) ** 3
    packed = round_rows(weight, 6.0)
    error = (packed.dequantize() - weight).abs()
    assert bool((error <= packed.scales[:, None] * (0.5 + 1e-5)).all())
    assert int(packed.codes.abs().amax(1).min()) == 127


def test_the_threshold_reaches_the_layers() -> None:
    block = block_of(tiny())
    for text, threshold in (("llm_int8", 6.0), ("llm_int8:threshold=2.5", 2.5)):
        packed = METHODS["llm_int8"].quantize_block(block, {}, configure(parse_variant(text)))
        assert {w.threshold for w in packed.values() if isinstance(w, OutlierWeight)} == {threshold}


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="the kernel wants VNNI")
@pytest.mark.usefixtures("without_native")
def test_it_runs_packed() -> None:
    model = tiny()
    block = block_of(model)
    config = configure(parse_variant("llm_int8"))
    for path, weight in METHODS["llm_int8"].quantize_block(block, {}, config).items():
        replace_linear(block.module, path, QuantLinear(weight, None))
    assert kernel_report(model.module) == ("oneDNN int8 + outlier columns", "packed", ())
