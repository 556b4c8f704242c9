"""Blocks of Llama-like families on the native kernels, for calibration: stopped at every linear.

Calibration runs thousands of tokens through one block, and wants to see what each linear reads:
for statistics, and to change the linear before the tokens go on. The kernels therefore compute a
block in five steps (`kernels/cpu/decoder.h`), with the inputs of the linears between them:

    norm -> [q, k, v] -> attention -> [o] -> norm -> [gate, up] -> act * up -> [down] -> x

Products take bfloat16 factors and are added up in float32, as under torch's autocast; but what
torch rounds to bfloat16 on the way (queries, scores, the gate) stays float32 here.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from ctypes import c_int64

import torch
from torch import Tensor, nn

from kernels import build, native
from quantlab.models import Block, LoadedModel
from quantlab.moments import multiplies_bfloat16
from quantlab.native_records import PATHS, Records, structure_refusal

READ_TOGETHER = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""The linears of a block that read the same input, in the order they run."""

Hook = Callable[[str, Tensor], None]


class NativeBlocks:
    """Runs one model's blocks on pieces of `length` tokens; `native_blocks` says where it can.

    Matrices are kept while their weights stay as they are, for one block at a time.
    """

    def __init__(self, model: LoadedModel, length: int) -> None:
        self._records = Records(model.module, length, native.BF16)
        config, first = model.module.config, model.module.base_model.layers[0]
        for kind in set(getattr(config, "layer_types", None) or [None]):
            self._records.rotation(kind)
        shape = (config.num_key_value_heads, self._records.capacity, first.self_attn.head_dim)
        self._model = self._records.model(
            [],
            keys=self._records.keep(torch.zeros(shape)),
            values=self._records.keep(torch.zeros(shape)),
        )
        self.length = length
        self._index = -1
        self._matrices: dict[str, tuple[Tensor, int, native.Matrix]] = {}

    def takes(self, block: Block, hidden: Tensor) -> bool:
        """Whether `run` does this as torch would: plain linears whose inputs are rounded to
        bfloat16, no gradients, pieces of the length known."""
        if torch.is_grad_enabled() or not multiplies_bfloat16():
            return False
        plain = all(type(linear) is nn.Linear for linear in block.linears.values())
        known = set(block.linears) == set(PATHS.values())
        return plain and known and hidden.shape[1] == self.length

    def run(self, block: Block, hidden: Tensor, hook: Hook) -> Tensor:
        """The block's output, float32 [pieces, length, width], from `hidden` of that shape, which
        stays. `hook` is called with each linear's path and input (bfloat16 [pieces, length,
        columns]) before the linear runs, and may change weights that have not run yet."""
        records = copy.copy(self._records)
        records.forget()
        layer = records.frame(block.module, block.index)
        x = hidden.float().contiguous().clone()
        pieces, length, _ = x.shape
        inputs: Tensor | None = None
        for step, names in enumerate((*READ_TOGETHER, ())):
            outputs = None
            if names:
                columns = block.linears[PATHS[names[0]]].in_features
                outputs = torch.empty(pieces, length, columns, dtype=torch.bfloat16)
            self._step(layer, step, x, inputs, outputs)
            inputs = outputs
            for name in names:
                assert inputs is not None
                hook(PATHS[name], inputs)
            for name in names:
                setattr(layer, name, self._linear(records, block, PATHS[name]))
        return x

    def _step(
        self,
        layer: native.LayerRecord,
        step: int,
        x: Tensor,
        inputs: Tensor | None,
        outputs: Tensor | None,
    ) -> None:
        records = (ctypes.byref(self._model), ctypes.byref(layer))
        sizes = map(c_int64, x.shape[:2])
        native.native()("ql_step", *records, c_int64(step), x, inputs, outputs, *sizes)

    def _linear(self, records: Records, block: Block, path: str) -> native.LinearRecord:
        """The linear as it is now."""
        if block.index != self._index:
            self._index = block.index
            self._matrices.clear()
        weight, bias = block.linears[path].weight, block.linears[path].bias
        known = self._matrices.get(path)
        # In-place changes raise the version, also without gradients.
        if known is None or known[0] is not weight or known[1] != weight._version:
            matrix = native.Matrix.plain(weight)
            known = self._matrices[path] = (weight, weight._version, matrix)
        return records.described(known[2], bias)


def native_blocks(model: LoadedModel, length: int) -> NativeBlocks | None:
    """The model's blocks on the native kernels; None where those have no products of bfloat16, or
    do not know the family."""
    try:
        known = structure_refusal(model.module.config) is None
        if not (known and build.chosen().multiplies_bfloat16):
            return None
    except build.BuildError:
        return None
    return NativeBlocks(model, length)
