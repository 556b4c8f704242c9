"""A variant ready to run: logits of windows, greedy decoding, and what it honestly is.

Four engines stand behind one face: QuantLab's own for Llama-like models on a CPU, transformers
modules with QuantLab's layers for the rest, llama.cpp for GGUF files, and ONNX Runtime for its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quantlab.engine import Choose, Session, greedy
from quantlab.layers import kernel_report
from quantlab.llamacpp import LlamaCpp
from quantlab.metrics.quality import TorchScorer
from quantlab.metrics.speed import Decoder, Speed, measure_speed
from quantlab.native_decoder import NativeDecoder, NativeSession
from quantlab.native_records import refusal
from quantlab.onnx_engine import OnnxModel
from quantlab.types import Execution


class Runner(Protocol):
    """`kernel`, `execution` and `fallbacks` go into the record as they are."""

    kernel: str
    execution: Execution
    fallbacks: tuple[str, ...]

    def chunks(self, window: Tensor) -> Iterator[tuple[int, Tensor]]: ...
    def session(self, choose: Choose = greedy) -> Decoder: ...
    def speed(self) -> Speed | None: ...

    def other_peak_bytes(self) -> int:
        """Peak memory of processes of its own, bytes."""
        ...

    def close(self) -> None: ...


class TorchRunner:
    """A transformers module whose linears may be QuantLinears."""

    def __init__(self, module: Any, bos: int | None, device: str, context: int) -> None:
        self.module = module.to(device)
        self._scorer = TorchScorer(self.module, bos)
        self._context = context
        self.kernel, self.execution, self.fallbacks = kernel_report(self.module)

    def chunks(self, window: Tensor) -> Iterator[tuple[int, Tensor]]:
        return self._scorer.chunks(window)

    def session(self, choose: Choose = greedy) -> Decoder:
        return Session(self.module, choose)

    def speed(self) -> Speed | None:
        """None for simulated arithmetic: its time says nothing about the packed weights."""
        if self.execution == "simulated":
            return None
        vocabulary = self.module.get_input_embeddings().weight.shape[0]
        return measure_speed(self.session(), vocabulary, self._context)

    def other_peak_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self.module = torch.nn.Module()


class NativeRunner:
    """A Llama-like model in the native decoder; the transformers module is not kept."""

    fallbacks: tuple[str, ...] = ()
    execution: Execution = "packed"

    def __init__(self, module: Any, bos: int | None, context: int) -> None:
        self._bos, self._context = bos, context
        # One more: the begin token that goes before a window.
        self._decoder: NativeDecoder | None = NativeDecoder(module, context + 1)
        self.kernel = self._decoder.info

    def _open(self) -> NativeDecoder:
        assert self._decoder is not None
        return self._decoder

    def chunks(self, window: Tensor) -> Iterator[tuple[int, Tensor]]:
        return self._open().chunks(window, self._bos)

    @contextmanager
    def exchanged(self, block: int, path: str, linear: Any) -> Iterator[None]:
        """As `NativeDecoder.exchanged`; `kernel` is then that of the exchange."""
        decoder, before = self._open(), self.kernel
        with decoder.exchanged(block, path, linear):
            self.kernel = decoder.info
            try:
                yield
            finally:
                self.kernel = before

    def session(self, choose: Choose = greedy) -> Decoder:
        return NativeSession(self._open(), choose)

    def speed(self) -> Speed | None:
        return measure_speed(self.session(), self._open().vocabulary, self._context)

    def other_peak_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self._decoder = None


def open_module(module: Any, bos: int | None, device: str, context: int) -> Runner:
    """The native decoder where it computes this model, else transformers; why not is a fallback.

    An unquantized float32 model is meant to run in torch: there it is no fallback."""
    reason = f"the native decoder runs on a CPU, not on {device}"
    if device == "cpu":
        reason = refusal(module) or ""
        if not reason:
            return NativeRunner(module, bos, context)
    runner = TorchRunner(module, bos, device, context)
    if module.get_output_embeddings().weight.dtype != torch.float32:
        runner.fallbacks += (f"transformers modules: {reason}",)
    return runner


class LlamaCppRunner:
    """A GGUF file in llama.cpp. Prompts and windows need different contexts, opened one at a
    time."""

    fallbacks: tuple[str, ...] = ()
    execution: Execution = "packed"

    def __init__(self, path: Path, bos: int | None, threads: int, context: int) -> None:
        self._path, self._bos, self._threads, self._context = path, bos, threads, context
        self._open: LlamaCpp | None = None
        self._every = False
        self._peak = 0
        self.kernel = self._engine(False).info

    def _engine(self, every: bool) -> LlamaCpp:
        if self._open is None or self._every != every:
            self.close()
            self._open = LlamaCpp(self._path, self._threads, self._context, every)
            self._every = every
        return self._open

    def chunks(self, window: Tensor) -> Iterator[tuple[int, Tensor]]:
        engine = self._engine(True)
        if self._bos is None:
            yield from engine.chunks(window)
            return
        ids = torch.cat([window.new_tensor([self._bos]), window])
        for start, logits in engine.chunks(ids):
            yield max(start - 1, 0), logits[1:] if start == 0 else logits

    def session(self, choose: Choose = greedy) -> Decoder:
        engine = self._engine(False)
        engine.choose = choose
        return engine

    def speed(self) -> Speed | None:
        engine = self._engine(False)
        engine.choose = greedy
        return measure_speed(engine, engine.vocabulary, self._context)

    def other_peak_bytes(self) -> int:
        return self._peak if self._open is None else max(self._peak, self._open.peak_rss_bytes())

    def close(self) -> None:
        if self._open is not None:
            self._peak = max(self._peak, self._open.peak_rss_bytes())
            self._open.close()
            self._open = None


class OnnxRunner:
    """An ONNX file in ONNX Runtime."""

    fallbacks: tuple[str, ...] = ()
    execution: Execution = "packed"

    def __init__(self, path: Path, bos: int | None, threads: int, limit: int) -> None:
        self._bos = bos
        self._engine: OnnxModel | None = OnnxModel(path, threads)
        self._engine.context = min(self._engine.context, limit)
        self.kernel = self._engine.info

    def _open(self) -> OnnxModel:
        assert self._engine is not None
        return self._engine

    def chunks(self, window: Tensor) -> Iterator[tuple[int, Tensor]]:
        if self._bos is None:
            yield from self._open().chunks(window)
            return
        ids = torch.cat([window.new_tensor([self._bos]), window])
        for start, logits in self._open().chunks(ids):
            yield start, logits[1:]

    def session(self, choose: Choose = greedy) -> Decoder:
        engine = self._open()
        engine.choose = choose
        return engine

    def speed(self) -> Speed | None:
        engine = self._open()
        engine.choose = greedy
        return measure_speed(engine, engine.vocabulary, engine.context)

    def other_peak_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self._engine = None
