"""Llama-like models on the native kernels: every token, or a whole prompt, in one C++ call.

`NativeDecoder` reads a transformers module once (weights, norms, rotation tables) and runs it
without transformers afterwards. Linears keep what they are: bfloat16 weights, or the packed weights
of a QuantLinear. Families and options that the C++ does not know are refused with the reason
(`native_records.refusal`), and run as transformers modules.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels import native
from quantlab.engine import Choose, context_length, greedy
from quantlab.errors import ConfigError
from quantlab.layers import QuantEmbedding
from quantlab.native_records import PATHS, Records, refusal
from quantlab.native_weights import matrix_of

CHUNK = 256
"""Positions whose logits are made at a time: 50 MB at a vocabulary of 49,152."""


class NativeDecoder:
    """A model and its cache for one sequence of at most `capacity` tokens.

    `exact` false lets weight-only layers round their inputs to int8 in blocks of 32 columns, as
    llama.cpp does. Raises: ConfigError for a model that `refusal` refuses.
    """

    def __init__(self, module: Any, capacity: int, *, exact: bool = True) -> None:
        if reason := refusal(module):
            raise ConfigError(reason)
        records = Records(module, capacity, native.EXACT if exact else native.INT8_BLOCK)
        self._records = records
        self.capacity = records.capacity
        self.vocabulary = module.get_output_embeddings().weight.shape[0]
        self.embedded = module.get_input_embeddings().weight.shape[0]
        self.context = context_length(module)
        layers = [records.layer(b, i) for i, b in enumerate(module.base_model.layers)]
        embedding, head = self._outer(module)
        config, head_dim = module.config, module.base_model.layers[0].self_attn.head_dim
        shape = (len(layers), config.num_key_value_heads, self.capacity, head_dim)
        self._record = records.model(
            layers,
            vocabulary=self.vocabulary,
            embedding=embedding,
            head=head,
            final_norm=records.norm(module.base_model.norm),
            keys=records.keep(torch.zeros(shape)),
            values=records.keep(torch.zeros(shape)),
        )
        del records.module  # what it needs of it, it has

    @property
    def info(self) -> str:
        """The decoder, its instruction set, and how inputs enter the products."""
        level, modes = native.native().level.label, self._records.modes
        eight = modes - {native.EXACT}
        inputs = "exact" if not eight else "8-bit" if eight == modes else "exact and 8-bit"
        return f"QuantLab native decoder ({level}), {inputs} inputs"

    def read(self, ids: Sequence[int], first: int, *, every: bool = False) -> tuple[int, Tensor]:
        """Read tokens after the `first` that were read; (likeliest next token, float32 logits [1 or
        tokens, vocabulary]). Raises: ConfigError where the cache has no room, for no tokens, and
        for tokens that the embedding does not have."""
        if not len(ids):
            raise ConfigError("there are no tokens to read")
        for token in (min(ids), max(ids)):
            if not 0 <= token < self.embedded:
                raise ConfigError(f"token {token}: this model has 0 to {self.embedded - 1}")
        if first + len(ids) > self.capacity:
            raise ConfigError(f"{first + len(ids)} tokens do not fit a cache of {self.capacity}")
        tokens = torch.tensor(ids, dtype=torch.int32)
        logits = torch.empty(len(ids) if every else 1, self.vocabulary)
        record = ctypes.byref(self._record)
        token = native.native()("ql_read", record, tokens, first, len(ids), int(every), logits)
        return token, logits

    @contextmanager
    def exchanged(self, block: int, path: str, linear: Any) -> Iterator[None]:
        """While this is open, `linear` stands in the place of a block's linear at `path`
        (`mlp.down_proj`). It must be one that `refusal` lets pass."""
        name = next(name for name, known in PATHS.items() if known == path)
        layer, records = self._record.layers[block], self._records
        before = native.LinearRecord.from_buffer_copy(getattr(layer, name))
        modes = set(records.modes)
        held = records.held
        setattr(layer, name, records.linear(linear))
        try:
            yield
        finally:
            setattr(layer, name, before)
            records.release(held)
            records.modes = modes

    def chunks(self, window: Tensor, bos: int | None) -> Iterator[tuple[int, Tensor]]:
        """(first position, float32 logits [n, vocabulary]) of the window's own tokens."""
        ids = window.tolist()
        first = 0
        if bos is not None:
            self.read([bos], 0)
            first = 1
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            yield start, self.read(part, first + start, every=True)[1]

    def _outer(self, module: Any) -> tuple[Any, native.LinearRecord]:
        """The embedding's matrix and the head; tied ones share their memory."""
        embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
        record = self._records.linear(head)
        if isinstance(embedding, QuantEmbedding):
            return self._records.point(matrix_of(embedding.weight_packed)[0]), record
        if embedding.weight.data_ptr() == head.weight.data_ptr():
            return record.w, record
        return self._records.point(native.Matrix.plain(embedding.weight)), record


class NativeSession:
    """One sequence, as `quantlab.engine.Session`: `prefill`, `step`, `logits`."""

    logits: Tensor

    def __init__(self, decoder: NativeDecoder, choose: Choose = greedy) -> None:
        self._decoder, self._choose, self._read = decoder, choose, 0
        self.context = decoder.context

    def prefill(self, ids: Sequence[int]) -> int:
        """Start over with a prompt. Raises: ConfigError for one that is empty or too long."""
        if not len(ids):
            raise ConfigError("the prompt has no tokens")
        limit = min(self._decoder.capacity, self.context or self._decoder.capacity)
        if len(ids) > limit:
            raise ConfigError(f"the prompt has {len(ids)} tokens; this model reads at most {limit}")
        self._read = 0
        return self._next(list(ids))

    def step(self, token: int) -> int:
        """Read `token` after everything read so far. Raises: RuntimeError before `prefill`."""
        if not self._read:
            raise RuntimeError("step() before prefill()")
        return self._next([token])

    def _next(self, ids: list[int]) -> int:
        token, logits = self._decoder.read(ids, self._read)
        self._read += len(ids)
        self.logits = logits[0]
        return token if self._choose is greedy else self._choose(self.logits)
