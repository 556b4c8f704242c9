"""ONNX Runtime as the engine of the files that `quantlab.export.onnx_int8` writes.

Runs in this process: ONNX Runtime has threads of its own and none of OpenMP's, and it answers a bad
file with an exception.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlab.engine import Choose, greedy
from quantlab.errors import MethodError, ModelError
from quantlab.export.onnx_graph import CONTEXT_KEY


class OnnxModel:
    """A decoder in ONNX Runtime: logits of whole windows, and decoding on a key-value cache.

    `context` is the most tokens it reads, from the file; `choose` picks the next token from the
    logits; `info` names version and operators. A step hands the cache over to the session and takes
    a longer one back: a copy of everything read so far, small against the weights at a few hundred
    tokens. Raises: ModelError for a file that ONNX Runtime refuses.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong is raised as well
        # Idle threads that spin would take the processor from whatever else is measured.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # each of its errors is a class of its own
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"model: ONNX Runtime cannot load {path.name} ({reason})") from None
        inputs = self._session.get_inputs()
        self._names = [output.name for output in self._session.get_outputs()]
        self._past = {i.name: i.shape for i in inputs if i.name.startswith("past_")}
        self._learned = any(i.name == "positions" for i in inputs)
        self._cache: list[Any] = []
        self._read_so_far = 0
        self.choose: Choose = greedy
        self._limit = int(self._session.get_modelmeta().custom_metadata_map[CONTEXT_KEY])
        self.context = self._limit
        self.vocabulary = int(self._session.get_outputs()[0].shape[-1])
        self.info = f"ONNX Runtime {onnxruntime.__version__} (DynamicQuantizeLinear, MatMulInteger)"

    def logits(self, ids: Sequence[int], first: int = 0) -> Tensor:
        """Read `ids` after everything read so far: float32 [len(ids) - first, vocabulary]."""
        import onnxruntime

        def value(array: Any) -> Any:
            return onnxruntime.OrtValue.ortvalue_from_numpy(array)

        start, total = self._read_so_far, self._read_so_far + len(ids)
        if total > self._limit:
            raise MethodError(f"onnx_int8: {total} tokens are more than the {self._limit} it reads")
        feed = {
            "ids": value(np.array([ids], np.int64)),
            "first": value(np.array([first], np.int64)),
            "last_index": value(np.array([total - 1], np.int32)),
            "total": value(np.array(total, np.int32)),
        }
        if self._learned:
            feed["positions"] = value(np.arange(start, total)[None])
        cache = self._cache
        if not cache:
            shapes = ((1, shape[1], 0, shape[3]) for shape in self._past.values())
            cache = [value(np.zeros(shape, np.float32)) for shape in shapes]
        feed |= dict(zip(self._past, cache, strict=True))
        try:
            logits, *self._cache = self._session.run_with_ort_values(self._names, feed)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise MethodError(f"ONNX Runtime failed after {start} tokens ({reason})") from None
        self._read_so_far = total
        return torch.from_numpy(logits.numpy()[0])

    def forget(self) -> None:
        """Start over: nothing has been read."""
        self._cache, self._read_so_far = [], 0

    def prefill(self, ids: Sequence[int]) -> int:
        """Read a prompt from the start; the id of the next token."""
        self.forget()
        return self.choose(self.logits(ids, len(ids) - 1)[0])

    def step(self, token: int) -> int:
        """Read one more token; the id of the next one."""
        return self.choose(self.logits([token])[0])

    def chunks(self, window: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(0, float32 logits [window, vocabulary]): in one piece, because the grids of its inputs
        are found over all tokens that are read together."""
        self.forget()
        yield 0, self.logits(window.tolist())
        self.forget()
