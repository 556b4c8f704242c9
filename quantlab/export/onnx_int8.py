"""ONNX Runtime's dynamic INT8: a model as an ONNX file that `quantize_dynamic` has rewritten.

Every product with a constant matrix becomes

    DynamicQuantizeLinear(x) -> x_code uint8, x_step, zero      one grid for the whole input
    y = MatMulInteger(x_code, w_code, zero, 0) * (x_step * w_step)

with w_code int8 (symmetric), fused into one operator when the file is opened. Norms, attention and
embedding stay in float32, and in the file too, as `quantize_dynamic` leaves them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantlab.export import onnx_graph
from quantlab.models import LoadedModel

ONE_FILE = 1_800_000_000
"""Bytes of weights up to which the file has no second one beside it: protobuf ends at 2 GiB."""


def check(model: LoadedModel) -> None:
    """Refuse a model that has no graph, before its weights are copied. Raises: ModelError."""
    onnx_graph.check_family(str(model.module.config.model_type))


def write(
    path: Path, model: LoadedModel, *, per_channel: bool, reduce_range: bool, head: bool
) -> Path:
    """Write `model` to `path` with its linears (and its head) in 8 bits; float weights of
    2 GB and more lie beside it. Raises: ModelError, OSError."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto = onnx_graph.build(model, head_apart=head)
    plain = path.with_name("float.onnx")
    weights = path.with_name("float.data")
    large = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > ONE_FILE
    try:
        onnx.save(proto, plain, save_as_external_data=True, location=weights.name)
        del proto
        quantize_dynamic(
            plain,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=per_channel,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[] if head else [onnx_graph.HEAD],
            use_external_data_format=large,
            # Types are not inferred through ONNX Runtime's own operators.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    finally:
        plain.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)
    return path


def weight_bytes(path: Path) -> int:
    """Bytes of all weights in the file, scales and zero-points counted; without the tables of
    rotary positions, which no other format stores."""
    import onnx

    proto: Any = onnx.load(path, load_external_data=False)
    total = 0
    for tensor in proto.graph.initializer:
        if tensor.name in ("cosines", "sines"):
            continue
        count = 1
        for size in tensor.dims:
            count *= size
        total += count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return total
