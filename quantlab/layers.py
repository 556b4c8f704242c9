"""QuantLinear: a packed weight with the kernel that runs it, in the place of an nn.Linear."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernels import dispatch, reference
from kernels.base import Choice, Prepared
from quantlab.operands import operands_of, problem_of
from quantlab.packing import (
    AffineWeight,
    CodebookWeight,
    GGMLWeight,
    OutlierWeight,
    PackedWeight,
    PermutedWeight,
    describe,
    pack_bits,
    pack_pairs,
    restore,
)
from quantlab.types import Execution


class QuantLinear(nn.Module):
    """y = x @ w.T + bias on a packed weight; any leading shape, any float dtype in and out.

    Inside, activations are `dtype`, which `.to(dtype)` of the model does not change: a kernel is
    chosen for it. `.choice` says which kernel runs and why. A kernel that keeps the codes in a
    layout of its own keeps the only copy of them; `.weight_packed` rebuilds the plain weight from
    it exactly. Layers without a kernel dequantize a tile at a time and keep nothing. No gradient
    flows. `nbytes` and `bits_per_weight` are those of the plain packed weight. A `resting` layer
    holds its weight as it is and asks for no kernel: it is there to be written, not to run.
    """

    choice: Choice
    bias: Tensor | None

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None,
        dtype: torch.dtype = torch.bfloat16,
        *,
        resting: bool = False,
    ) -> None:
        super().__init__()
        self.resting = resting
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.nbytes, self.bits_per_weight = weight.nbytes, weight.bits_per_weight
        self._install(weight, None if bias is None else bias.detach().clone())

    def _install(self, weight: PackedWeight, bias: Tensor | None) -> None:
        """Choose a kernel where the weight is, and register what it keeps as buffers."""
        self.device = next(iter(weight.tensors().values())).device
        self.register_buffer("bias", bias)
        self.choice, self._prepared = self._prepare(weight, bias)
        self._plain = weight if self._prepared is None else None
        self._description = describe(weight)
        kept = dict(weight.tensors())
        if self._prepared is not None:
            if isinstance(weight, GGMLWeight):
                kept = {"factors": weight.factors()}
            else:
                del kept["codes"]
            layout = self._prepared.tensors()
            kept |= {f"kernel_{name}": tensor for name, tensor in layout.items()}
        for name in [name for name in self._buffers if name != "bias"]:
            del self._buffers[name]
        for name, tensor in kept.items():
            self.register_buffer(name, tensor, persistent=False)

    def _prepare(self, weight: PackedWeight, bias: Tensor | None) -> tuple[Choice, Prepared | None]:
        if self.resting:
            return dispatch.fallback("the layer rests"), None
        problem = problem_of(weight, self.device.type, self.dtype)
        if isinstance(problem, str):
            return dispatch.fallback(problem), None
        return dispatch.prepare(problem, lambda: operands_of(weight, bias))

    @property
    def prepared(self) -> Prepared | None:
        """The weight in its kernel's layout, None where the reference runs it."""
        return self._prepared

    @property
    def input_order(self) -> Tensor | None:
        """Columns of the input in the order in which the kernel wants them; None: as they are."""
        return self._buffers.get("order")

    @property
    def weight_packed(self) -> PackedWeight:
        """The plain packed weight, bit for bit the one the layer was made from."""
        if self._plain is not None:
            return self._plain
        assert self._prepared is not None
        tensors = {
            name: tensor
            for name, tensor in self._buffers.items()
            if tensor is not None and name != "bias" and not name.startswith("kernel_")
        }
        codes, bits = self._prepared.codes(), self._description.get("bits")
        if self._description["representation"] == "ggml":
            type = str(self._description["type"])
            return GGMLWeight.from_codes(type, tensors["factors"], codes)
        if isinstance(bits, int):
            tensors["codes"] = pack_bits(codes, bits)
        elif self._description["representation"] == "codebook":
            tensors["codes"] = pack_pairs(codes)
        else:
            tensors["codes"] = (codes ^ 128).view(torch.int8)
        return restore(self._description, tensors)

    @property
    def weight(self) -> Tensor:
        """For code that asks a linear for the dtype, device or shape of its weight; its values are
        NaN, so that arithmetic on it is noticed. Takes no memory."""
        nan = torch.full((), float("nan"), dtype=self.dtype, device=self.device)
        return nan.expand(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input has {x.shape[-1]} features, this layer {self.in_features}")
        shape = (*x.shape[:-1], self.out_features)
        rows = x.detach().reshape(-1, self.in_features).to(self.dtype)
        if self.input_order is not None:
            rows = rows.index_select(1, self.input_order)
        y = self._simulate(rows) if self._prepared is None else self._prepared(rows)
        return y.to(x.dtype).view(shape)

    def _simulate(self, x: Tensor) -> Tensor:
        weight = self._plain
        assert weight is not None
        if isinstance(weight, PermutedWeight):
            weight = weight.inner  # the columns of x are in its order

        def tile(first: int, last: int) -> Tensor:
            return dequantize_rows(weight, first, last)

        if isinstance(weight, OutlierWeight):
            return self._simulate_outliers(x, tile, weight.threshold or float("inf"))
        activation = weight.activation if isinstance(weight, AffineWeight) else None
        if activation is None:
            return reference.tiled_linear(x, tile, self.out_features, self.bias)
        scale = activation.scale if activation.kind == "tensor" else None
        # Centred codes are whole numbers up to 255: exact in bfloat16.
        centred, step = reference.quantize_input(x, scale, activation.zero, activation.kind)
        y = reference.tiled_linear(centred.to(x.dtype), tile, self.out_features, None).float()
        y = y * step
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def _simulate_outliers(
        self, x: Tensor, tile: Callable[[int, int], Tensor], threshold: float
    ) -> Tensor:
        codes, step, columns = reference.split_outliers(x, threshold)
        y = reference.tiled_linear(codes.to(x.dtype), tile, self.out_features, None).float() * step
        if columns.numel():
            large = torch.zeros_like(x).index_copy_(1, columns, x[:, columns])
            y += reference.tiled_linear(large, tile, self.out_features, None).float()
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """`.to(device)`: move the plain weight and choose again there. Dtypes stay as they are."""
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.device)).device
        if device != self.device:
            tensors = self.weight_packed.tensors()
            moved = {name: tensor.to(device) for name, tensor in tensors.items()}
            bias = None if self.bias is None else self.bias.to(device)
            self._install(restore(self._description, moved), bias)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made from the plain weight; kernel layouts can be opaque."""
        return QuantLinear, (self.weight_packed, self.bias, self.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, {self.bits_per_weight:.2f} bits a weight, "
            f"{self.choice.kernel} ({self.choice.execution})"
        )


class QuantEmbedding(nn.Module):
    """Rows of a packed weight by token id, dequantized on lookup: any shape of ids -> dtype
    [..., columns].

    A tied head is a QuantLinear of the same PackedWeight: the bytes are kept once on disk and in
    size figures. In memory a kernel with a layout of its own holds the codes a second time.
    """

    def __init__(self, weight: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype
        self.nbytes, self.bits_per_weight = weight.nbytes, weight.bits_per_weight
        self._description = describe(weight)
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def weight_packed(self) -> PackedWeight:
        """The plain packed weight, on the device where the layer is."""
        tensors = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        return restore(self._description, tensors)

    @property
    def weight(self) -> Tensor:
        """As `QuantLinear.weight`: dtype, device and shape, NaN for values, no memory."""
        device = next(iter(self._buffers.values())).device  # type: ignore[union-attr]
        nan = torch.full((), float("nan"), dtype=self.dtype, device=device)
        return nan.expand(self.num_embeddings, self.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        rows = select_rows(self.weight_packed, ids.reshape(-1))
        return rows.dequantize().to(self.dtype).view(*ids.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:
        """`.to(device)` moves; dtypes stay as they are (float16 scales are part of the weight)."""
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.weight.device)).device
        for name, tensor in self._buffers.items():
            if tensor is not None:
                self._buffers[name] = tensor.to(device)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, {self.bits_per_weight:.2f} bits a weight"
        )


def select_rows(weight: PackedWeight, rows: Tensor) -> PackedWeight:
    """The packed weight of the given rows (int64 [n], repeats allowed), in that order."""
    if isinstance(weight, GGMLWeight):
        return dataclasses.replace(weight, data=weight.data[rows])
    if not isinstance(weight, AffineWeight):
        raise TypeError(f"no rows of {type(weight).__name__} can be looked up")
    shared = weight.scales.shape[0] == 1

    def part(tensor: Tensor) -> Tensor:
        return tensor if shared else tensor[rows]

    return dataclasses.replace(
        weight,
        codes=weight.codes[rows],
        scales=part(weight.scales),
        zeros=None if weight.zeros is None else part(weight.zeros),
    )


def dequantize_rows(weight: PackedWeight, first: int, last: int) -> Tensor:
    """Rows first to last - 1 of the weight, float32."""
    if isinstance(weight, GGMLWeight):
        return dataclasses.replace(weight, data=weight.data[first:last]).dequantize()
    if isinstance(weight, CodebookWeight):
        return weight.dequantize_rows(first, last)
    if isinstance(weight, OutlierWeight):
        codes, scales = weight.codes[first:last], weight.scales[first:last]
        return dataclasses.replace(weight, codes=codes, scales=scales).dequantize()
    if not isinstance(weight, AffineWeight):
        return weight.dequantize()[first:last]
    shared = weight.scales.shape[0] == 1

    def part(tensor: Tensor) -> Tensor:
        return tensor if shared else tensor[first:last]

    return dataclasses.replace(
        weight,
        codes=weight.codes[first:last],
        scales=part(weight.scales),
        zeros=None if weight.zeros is None else part(weight.zeros),
    ).dequantize()


def replace_linear(parent: nn.Module, name: str, linear: nn.Module) -> None:
    """Put `linear` in the place of the submodule `name` (a dotted path) of `parent`.

    Raises: AttributeError where there is none."""
    path, _, leaf = name.rpartition(".")
    owner = parent.get_submodule(path)
    owner.get_submodule(leaf)
    setattr(owner, leaf, linear)


def kernel_report(model: nn.Module) -> tuple[str, Execution, tuple[str, ...]]:
    """(kernels that run, 'packed' only if every layer is, the fallbacks taken) of a model.

    A model without QuantLinears runs torch's own matmul on its own weights, which is 'packed'."""
    choices = [m.choice for m in model.modules() if isinstance(m, QuantLinear)]
    if not choices:
        first = next(iter(model.parameters()), None)
        dtype = "none" if first is None else str(first.dtype).removeprefix("torch.")
        return f"torch matmul ({dtype})", "packed", ()
    names = " + ".join(dict.fromkeys(choice.kernel for choice in choices))
    simulated = Counter(choice for choice in choices if choice.execution == "simulated")
    fallbacks = tuple(
        f"{count} of {len(choices)} layers by {choice.kernel}: {choice.why}"
        for choice, count in simulated.items()
    )
    return names, "simulated" if simulated else "packed", fallbacks
