"""One model in the engine of a comparison, whose linears are exchanged one at a time; and an
original whose logits are made once for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.layers import QuantLinear, replace_linear
from quantlab.metrics.quality import Reference, Scorer
from quantlab.models import LoadedModel
from quantlab.native_records import refusal
from quantlab.packing import PackedWeight
from quantlab.runners import NativeRunner, TorchRunner

MAX_CONTEXT = 2048
"""Positions of the cache, as in a comparison."""
KEPT_BYTES = 2**30
"""Logits of the original are made once for all linears while they take less than this."""


@dataclass
class KeptReference(Reference):
    """A reference that makes its logits once, where they fit `KEPT_BYTES`."""

    kept: dict[tuple[int, int, int], Tensor] = dataclasses.field(default_factory=dict)
    room: bool = True

    @classmethod
    def of(cls, plain: Reference) -> KeptReference:
        vocabulary = plain.head(plain.hidden[0, :1]).shape[-1]
        positions = plain.hidden.shape[0] * plain.hidden.shape[1]
        return cls(plain.hidden, plain.head, room=4 * positions * vocabulary <= KEPT_BYTES)

    def logits(self, window: int, start: int, stop: int) -> Tensor:
        place = (window, start, stop)
        if place in self.kept:
            return self.kept[place]
        made = super().logits(*place)
        if self.room:
            self.kept[place] = made
        return made


class Engine:
    """The bfloat16 model in the engine that a comparison would run it in, one linear exchanged at a
    time. `kernel` names what ran last."""

    def __init__(self, model: LoadedModel, bos: int | None) -> None:
        self._module, self._bos = model.module, bos
        self._prefix = model.family.blocks
        limit = int(getattr(model.module.config, "max_position_embeddings", MAX_CONTEXT))
        self._context = min(limit, MAX_CONTEXT)
        self._native: NativeRunner | None = None
        if refusal(self._module) is None:
            self._native = NativeRunner(self._module, bos, self._context)
        self.kernel = ""

    @contextmanager
    def unquantized(self) -> Iterator[Scorer]:
        yield self._native or self._torch()

    @contextmanager
    def quantized(self, name: str, weight: PackedWeight) -> Iterator[Scorer]:
        """The model with the packed weight in the place of the linear `name`."""
        path = f"{self._prefix}.{name}"
        plain = self._module.get_submodule(path)
        layer = QuantLinear(weight, plain.bias, dtype=torch.bfloat16)
        replace_linear(self._module, path, layer)
        try:
            if self._native is None or refusal(self._module) is not None:
                yield self._torch()
                return
            block, _, inner = name.partition(".")
            with self._native.exchanged(int(block), inner, layer):
                self.kernel = self._native.kernel
                yield self._native
        finally:
            replace_linear(self._module, path, plain)

    def _torch(self) -> TorchRunner:
        runner = TorchRunner(self._module, self._bos, "cpu", self._context)
        self.kernel = runner.kernel
        return runner
