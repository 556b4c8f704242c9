"""Dynamic INT8 against ONNX's own definition, torch's implementation and integers in loops."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import reference, torch_w8a8
from quantlab.errors import ConfigError
from quantlab.layers import QuantLinear
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.methods.dynamic_int8 import DynamicInt8Config
from quantlab.packing import AffineWeight
from tests.methods.planted import inputs, planted
from tests.tiny import block_of, correlated, lone_block, random

pytestmark = pytest.mark.usefixtures("exact")


def quantize(weight: Tensor, **options: object) -> AffineWeight:
    config = DynamicInt8Config(**options)  # type: ignore[arg-type]
    packed = METHODS["dynamic_int8"].quantize_block(lone_block({"w": weight}), {}, config)["w"]
    assert isinstance(packed, AffineWeight)
    return packed


INPUTS = {
    "both signs": correlated(40, 64),
    "positive": correlated(40, 64).abs() + 0.3,
    "negative": -correlated(40, 64).abs() - 0.3,
    "massive": correlated(40, 64).index_put((torch.tensor(3), torch.tensor(9)), torch.tensor(3e3)),
    "zeros": torch.zeros(3, 64),
    "one": random(1, 64, seed=4),
}
by_input = pytest.mark.parametrize("name", INPUTS)


def onnx_dynamic_quantize(x: Tensor) -> tuple[Tensor, float, int]:
    """(codes, step, zero) by the reference evaluator of ONNX itself."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "step", "zero"])
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "graph",
        [info("x", TensorProto.FLOAT, None)],
        [
            info("codes", TensorProto.UINT8, None),
            info("step", TensorProto.FLOAT, None),
            info("zero", TensorProto.UINT8, None),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it divides by a step of 0 for zeros
        codes, step, zero = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    return torch.from_numpy(np.asarray(codes)), float(step), int(zero)


@by_input
def test_the_grid_is_that_of_onnx(name: str) -> None:
    x = INPUTS[name]
    if not bool(x.any()):
        pytest.skip("ONNX divides by zero there")
    codes, step, zero = onnx_dynamic_quantize(x)
    ours, our_zero = reference.dynamic_grid(x, per_row=False)
    assert float(ours) == pytest.approx(step, rel=1e-6)
    assert int(our_zero) == zero
    centred, _ = reference.quantize_dynamic(x, per_row=False)
    assert int((centred - (codes.float() - zero)).abs().max()) <= 1
    assert float((centred != codes.float() - zero).float().mean()) < 1e-3


@by_input
def test_each_token_has_a_grid_of_its_own(name: str) -> None:
    x = INPUTS[name]
    centred, steps = reference.quantize_dynamic(x, per_row=True)
    for row in range(len(x)):
        alone, step = reference.quantize_dynamic(x[row : row + 1], per_row=False)
        assert torch.equal(alone[0], centred[row])
        assert float(step) == float(steps[row])


# --- the layer ---------------------------------------------------------------------------------


def by_hand(x: Tensor, weight: Tensor, per_channel: bool, per_token: bool) -> Tensor:
    """Both sides rounded and multiplied as python's whole numbers: float64 [tokens, rows]."""
    x64, w64 = x.double(), weight.double()
    found = torch.empty(len(x), len(weight), dtype=torch.float64)
    for n in range(len(weight)):
        w_step = float((w64[n] if per_channel else w64).abs().max()) / 127
        w_codes = torch.round(w64[n] / w_step).long().tolist()
        for m in range(len(x)):
            seen = x64[m] if per_token else x64
            low, high = min(float(seen.min()), 0.0), max(float(seen.max()), 0.0)
            step = max((high - low) / 255, 1e-12)
            zero = round(-low / step)
            codes = [min(max(round(float(v) / step) + zero, 0), 255) - zero for v in x64[m]]
            total = sum(a * b for a, b in zip(codes, w_codes, strict=True))
            found[m, n] = total * w_step * step
    return found


@by_input
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("activations", ["tensor", "token"])
def test_the_layer_computes_the_definition(name: str, activations: str, per_channel: bool) -> None:
    x, weight = INPUTS[name][:12], random(9, 64, seed=2) * torch.linspace(0.2, 2, 9)[:, None]
    packed = quantize(weight, activations=activations, per_channel=per_channel)
    got = QuantLinear(packed, None, dtype=torch.float32)(x)
    want = by_hand(x, weight, per_channel, activations == "token")
    step = (x.amax().clamp_min(0) - x.amin().clamp_max(0)) / 255
    # A tie that float32 rounds the other way is one step of one input times one weight.
    slack = float(step * weight.abs().max()) + 1e-5 * float(want.abs().max())
    assert float((got.double() - want).abs().max()) <= 1.01 * slack + 1e-9


@pytest.mark.usefixtures("without_native")
@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="integer kernel needs VNNI")
def test_integer_products_run_it() -> None:
    for activations in ("tensor", "token"):
        choice = QuantLinear(quantize(random(8, 64), activations=activations), None).choice
        assert (choice.kernel, choice.execution) == (torch_w8a8.NAME, "packed")


@by_input
def test_agrees_with_torch_s_dynamic_linear(name: str) -> None:
    """torch.ao's dynamic linear is this op (its modules call it with 7 bits for old processors)."""
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch has no x86 quantized engine here")
    x, weight = INPUTS[name], random(9, 64, seed=2)
    step = weight.abs().amax(1) / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of a package that is not needed
        codes = torch.quantize_per_channel(
            weight, step.double(), torch.zeros(9, dtype=torch.int64), 0, torch.qint8
        )
        packed = torch.ops.quantized.linear_prepack(codes, None)
        theirs = torch.ops.quantized.linear_dynamic(x, packed, False)
    ours = QuantLinear(quantize(weight), None, dtype=torch.float32)(x)
    # It picks the zero-point of the end that is nearer, so that all of an input may move a step.
    x_step = (x.amax().clamp_min(0) - x.amin().clamp_max(0)) / 255
    bound = float(x_step) * weight.abs().sum(1).max() * 0.51 + 1e-5
    assert float((ours - theirs).abs().max()) <= float(bound)
    if bool(x.any()):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


# --- claims and refusals -----------------------------------------------------------------------


def test_a_token_s_result_depends_on_its_company_only_per_tensor() -> None:
    """What the docstring says of the two granularities."""
    weight, x = random(16, 64, seed=2), INPUTS["massive"]
    for activations, same in (("token", True), ("tensor", False)):
        layer = QuantLinear(quantize(weight, activations=activations), None, torch.float32)
        together, alone = layer(x), torch.cat([layer(row[None]) for row in x])
        assert torch.allclose(together, alone, rtol=1e-4, atol=1e-4) is same


def test_a_massive_activation_spoils_all_tokens_unless_each_has_its_grid() -> None:
    model = planted("llama")
    x, weight = inputs(model)["mlp.down_proj"], block_of(model).linears["mlp.down_proj"].weight
    x[0, 5] = 400 * x.abs().max()
    errors = {}
    for activations in ("tensor", "token"):
        layer = QuantLinear(quantize(weight, activations=activations), None, torch.float32)
        want = x @ weight.double().T
        off = layer(x.float()).double() - want
        errors[activations] = float(off[1:].norm() / want[1:].norm())
    assert errors["token"] < 0.02
    assert errors["tensor"] > 0.5


def test_wrong_options_are_refused() -> None:
    for text in ("dynamic_int8:4", "dynamic_int8:8:activations=static"):
        with pytest.raises(ConfigError, match="choose"):
            parse_variant(text)
    assert configure(parse_variant("dynamic_int8")) == DynamicInt8Config()
