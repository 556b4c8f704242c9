"""ONNX Runtime's dynamic INT8: the graph is the model, the quantized file computes its definition,
and a row of a comparison comes out of it."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from quantlab import pipeline
from quantlab.errors import ConfigError, MethodError, ModelError
from quantlab.export import onnx_graph, onnx_int8
from quantlab.methods import METHODS, configure, parse_variant, parse_variants
from quantlab.models import LoadedModel
from quantlab.onnx_engine import OnnxModel
from quantlab.packing import AffineWeight
from quantlab.store import Store
from quantlab.types import RunSpec
from tests import tiny

FAMILIES = ("llama", "mistral", "qwen2", "gpt2", "opt", "opt-post")


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str]) -> Any:
    """Neither package says anything, not even about processors and thread affinities."""
    yield
    out = capfd.readouterr()
    # Of transformers, where a test saves a model.
    said = [line for line in out.err.splitlines() if line and "Writing model shards" not in line]
    assert (out.out, said) == ("", [])


def opened(folder: Path, model: LoadedModel, *, head_apart: bool = False) -> OnnxModel:
    """The float graph in ONNX Runtime."""
    path = folder / "float.onnx"
    onnx.save(onnx_graph.build(model, head_apart=head_apart), path)
    return OnnxModel(path, threads=1)


def quantized(
    folder: Path, model: LoadedModel, per_channel: bool = False, reduce_range: bool = False,
    head: bool = False,
) -> Path:  # fmt: skip
    return onnx_int8.write(
        folder / "model.onnx",
        model,
        per_channel=per_channel,
        reduce_range=reduce_range,
        head=head,
    )


# --- the graph ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_graph_computes_the_model(name: str, tied: bool, tmp_path: Path) -> None:
    """In one piece, and on a cache in pieces of any length; float32 against float64 arithmetic of
    logits of order 5. Mistral's window of 8 is passed many times over."""
    model, ids = tiny.tiny(name, tied=tied), tiny.token_ids(1, 40)[0]
    wanted = tiny.logits(model.module, ids[None])[0]
    engine = opened(tmp_path, model)
    ((start, logits),) = engine.chunks(ids)
    assert start == 0
    torch.testing.assert_close(logits.double(), wanted, rtol=0, atol=2e-5)
    assert engine.prefill(ids[:25].tolist()) == int(wanted[24].argmax())
    for position in range(25, 32):
        assert engine.step(int(ids[position])) == int(wanted[position].argmax())
    rest = engine.logits(ids[32:].tolist(), first=3)
    torch.testing.assert_close(rest.double(), wanted[35:], rtol=0, atol=2e-5)


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    model = tiny.tiny("llama", tied=True)
    graph = onnx_graph.build(model).graph
    numbers = sum(math.prod(tensor.dims) for tensor in graph.initializer)
    rotations = 2 * tiny.CONTEXT * 8
    assert numbers == model.parameters + rotations + 2
    ids = tiny.token_ids(1, 12)[0]
    apart = opened(tmp_path, model, head_apart=True).logits(ids.tolist())
    wanted = tiny.logits(model.module, ids[None])[0]
    torch.testing.assert_close(apart.double(), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_context_is_the_model_s_and_no_further(name: str, tmp_path: Path) -> None:
    engine = opened(tmp_path, tiny.tiny(name))
    assert (engine.context, engine.vocabulary) == (tiny.CONTEXT, tiny.VOCABULARY)
    engine.prefill(list(range(2, 2 + tiny.CONTEXT)))
    with pytest.raises(MethodError, match="129 tokens are more than the 128 it reads"):
        engine.step(5)


def test_what_the_graph_cannot_express_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no ONNX graph for gpt_neox; onnx_int8 runs llama.*dyna"):
        onnx_graph.build(tiny.tiny("neox"))
    model = tiny.tiny("llama")
    model.module.config.hidden_act = "quick_gelu"
    with pytest.raises(ModelError, match="no activation quick_gelu"):
        onnx_graph.build(model)
    model = tiny.tiny("llama")
    model.module.model.layers[0].extra = torch.nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"no place for model\.layers\.0\.extra\.weight"):
        onnx_graph.build(model)
    model = tiny.tiny("gpt2")
    model.module.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ModelError, match="attention scaled by layer"):
        onnx_graph.build(model)


def test_a_file_that_is_no_graph_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"cannot load broken\.onnx"):
        OnnxModel(path, threads=1)


# --- the definition ----------------------------------------------------------------------------


def run_with_values(path: Path, names: list[str], ids: list[int]) -> dict[str, Any]:
    """Values inside the graph while it reads `ids`, fused and optimised as always."""
    proto = onnx.load(path)
    proto.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed: dict[str, Any] = {
        "ids": np.array([ids]),
        "first": np.array([0]),
        "last_index": np.array([len(ids) - 1], np.int32),
        "total": np.array(len(ids), np.int32),
    }
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    return dict(zip(names, session.run(names, feed), strict=True))


def by_definition(x: Any, codes: Any, w_zero: Any, w_step: Any) -> tuple[Any, Any]:
    """MatMulInteger(DynamicQuantizeLinear(x)) scaled, written out: (y float64, step of x).

    x: float32 [tokens, columns]; codes: int8 [columns, rows]."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = np.float32((np.float32(high) - np.float32(low)) / np.float32(255))
    zero = int(np.clip(np.round(np.float32(-low) / step), 0, 255))
    x_codes = np.clip(np.round(x / step) + zero, 0, 255).astype(np.int64)
    sums = (x_codes - zero) @ (codes.astype(np.int64) - w_zero.astype(np.int64))
    return sums.astype(np.float64) * float(step) * w_step.astype(np.float64), float(step)


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_quantized_file_computes_its_definition(
    per_channel: bool, reduce_range: bool, tmp_path: Path
) -> None:
    """From the file's own initializers, by hand, on the values its session had at that place."""
    path = quantized(tmp_path, tiny.tiny("llama"), per_channel, reduce_range)
    graph = onnx.load(path).graph
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    block = "model.layers.1"
    places = {
        f"{block}.self_attn.q_proj": f"{block}.input_layernorm",
        f"{block}.self_attn.o_proj": "attention_1",
        f"{block}.mlp.up_proj": f"{block}.post_attention_layernorm",
        f"{block}.mlp.down_proj": f"{block}.gated",
    }
    ids = tiny.token_ids(1, 30)[0].tolist()
    values = run_with_values(path, [*places, *places.values()], ids)
    for output, source in places.items():
        name = f"{output}.weight"
        codes, w_step = kept[f"{name}_quantized"], kept[f"{name}_scale"]
        assert codes.dtype == np.int8
        wanted, step = by_definition(values[source][0], codes, kept[f"{name}_zero_point"], w_step)
        off = np.abs(values[output][0] - wanted)
        # Float32 scaling; a code on a tie may fall to the other side, one step times a weight.
        rounding = 1e-6 * np.abs(wanted).max() + 1e-6
        assert np.quantile(off, 0.99) <= rounding
        assert off.max() <= rounding + 1.01 * step * np.abs(codes * w_step).max()


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_method_s_packed_weights_are_those_of_the_file(
    name: str, per_channel: bool, reduce_range: bool, tmp_path: Path
) -> None:
    model = tiny.tiny(name)
    options = f"per_channel={per_channel}:reduce_range={reduce_range}".lower()
    config = configure(parse_variant(f"onnx_int8:8:{options}"))
    packed = METHODS["onnx_int8"].quantize_block(tiny.block_of(model), {}, config)
    path = quantized(tmp_path, model, per_channel, reduce_range)
    kept = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for linear, weight in packed.items():
        assert isinstance(weight, AffineWeight)
        place = f"{model.family.blocks}.0.{linear}.weight"
        codes, scales, _ = weight.unpacked()
        theirs = kept[f"{place}_quantized"].astype(np.int64).T + 128
        assert not kept[f"{place}_zero_point"].any()
        np.testing.assert_allclose(
            kept[f"{place}_scale"].reshape(-1), scales.numpy().reshape(-1), rtol=1e-6
        )
        off = np.abs(codes.numpy().astype(np.int64) - theirs)
        assert off.max() <= 1
        assert off.mean() < 1e-3  # ties
        largest = 64 if reduce_range else 127
        assert np.abs(theirs - 128).max() == largest


def test_only_products_with_the_linears_are_quantized(tmp_path: Path) -> None:
    for head, count in ((False, 14), (True, 15)):
        path = quantized(tmp_path, tiny.tiny("llama", tied=True), head=head)
        kinds = [node.op_type for node in onnx.load(path).graph.node]
        assert kinds.count("MatMulInteger") == count
        assert kinds.count("MatMul") == 15 - count
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


# --- a row of a comparison ---------------------------------------------------------------------

SPEC = RunSpec(eval_tokens=192, window=64, prompts=("The river",), max_new_tokens=6, threads=1)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_row_like_any_other(name: str, home: Path, tmp_path: Path) -> None:
    import dataclasses

    folder = tiny.saved(tmp_path / "model", name, tied=True)
    spec = dataclasses.replace(
        SPEC,
        model=str(folder),
        variants=parse_variants("fp32,onnx_int8,dynamic_int8:8:per_channel=false"),
    )
    store = Store()
    original, row, ours = pipeline.compare(spec, store=store)
    assert (row.status, row.error) == ("finished", None)
    assert row.kernel.startswith(f"ONNX Runtime {onnxruntime.__version__}")
    assert (row.execution, row.fallbacks, row.bits, row.activation_bits) == ("packed", (), 8, 8)
    assert row.environment["versions"]["onnxruntime"] == onnxruntime.__version__
    assert row.prefill_tokens_per_second is not None
    assert row.decode_tokens_per_second is not None
    assert len(row.outputs[0].tokens) == 6
    # The same arithmetic, up to bfloat16 between QuantLab's layers.
    assert row.perplexity == pytest.approx(ours.perplexity, rel=0.02)
    assert 0 < row.kl_divergence < 0.05
    model = tiny.tiny(name, tied=True)
    linears = [m for b in range(2) for m in tiny.block_of(model, b).linears.values()]
    eighth = sum(m.weight.numel() for m in linears)
    # A float32 scale and an int8 zero-point for each matrix, one int64 pair for the slice.
    wanted = 4 * (model.parameters - eighth) + eighth + 5 * len(linears) + 16
    offset_rows = 2 * 64 * 4 if name == "opt" else 0  # OPT's table of positions begins two early
    assert row.size_bytes == wanted - offset_rows
    again = pipeline.compare(spec, store=store)[1]
    assert again.cached
    assert again.perplexity == row.perplexity
    assert original.perplexity is not None


def test_an_architecture_without_a_graph_is_a_failed_row(home: Path, tmp_path: Path) -> None:
    import dataclasses

    folder = tiny.saved(tmp_path / "model", "neox")
    spec = dataclasses.replace(SPEC, model=str(folder), variants=parse_variants("onnx_int8"))
    (row,) = pipeline.compare(spec, store=Store())
    assert row.status == "failed"
    assert "no ONNX graph for gpt_neox" in (row.error or "")


def test_without_the_packages_it_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    for gone, words in (
        (("onnx", "onnxruntime"), "onnx and onnxruntime, which are not installed"),
        (("onnxruntime",), "onnxruntime, which is not installed"),
    ):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, gone=gone: None if n in gone else find(n)
        )
        with pytest.raises(ConfigError) as caught:
            parse_variant("onnx_int8")
        assert words in str(caught.value)
        assert str(caught.value).endswith("pip install -r requirements-onnx.txt")
        parse_variant("dynamic_int8")
    assert (Path(pipeline.__file__).parents[1] / "requirements-onnx.txt").is_file()


def test_it_is_not_written_in_quantlab_s_formats(tmp_path: Path) -> None:
    for form in ("quantlab", "gguf"):
        with pytest.raises(ConfigError, match="onnx_int8 is measured by compare only"):
            pipeline.quantize(SPEC, parse_variant("onnx_int8"), tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []
    assert json.dumps(configure(parse_variant("onnx_int8")).to_json())
