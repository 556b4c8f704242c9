"""llama.cpp as the engine of GGUF files, through llama-cpp-python.

Tokens go in as ids from the model's own tokenizer, so that every variant reads the same windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlab.engine import Choose, greedy
from quantlab.errors import ModelError

BATCH = 512


class LlamaCpp:
    """A GGUF file in llama.cpp: logits of whole windows, and decoding token by token.

    `choose` picks the next token from the logits. Close it when done. Raises: ModelError when
    llama.cpp refuses the file.
    """

    def __init__(self, path: Path, threads: int, context: int = 2048, every: bool = False) -> None:
        import llama_cpp

        self.choose: Choose = greedy
        try:
            self._llama: Any = llama_cpp.Llama(
                str(path),
                n_ctx=context,
                n_batch=BATCH,
                n_ubatch=BATCH,
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=every,
                verbose=False,
            )
        except (ValueError, RuntimeError, AssertionError, OSError) as error:
            raise ModelError(f"model: llama.cpp cannot load {path.name} ({error})") from None

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self._llama.n_vocab())

    def close(self) -> None:
        self._llama.close()

    def chunks(self, window: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(0, float32 logits [window, vocabulary]); needs `every=True`."""
        ids = window.tolist()
        self._llama.reset()
        self._llama.eval(ids)
        for start in range(0, len(ids), BATCH):
            stop = min(start + BATCH, len(ids))
            yield start, torch.from_numpy(np.asarray(self._llama.scores[start:stop]).copy())

    def prefill(self, ids: Sequence[int]) -> int:
        """Read a prompt from the start; the id of the next token."""
        self._llama.reset()
        return self._read(list(ids))

    def step(self, token: int) -> int:
        """Read one more token; the id of the next one."""
        return self._read([token])

    def _read(self, ids: list[int]) -> int:
        import llama_cpp

        self._llama.eval(ids)
        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        logits = np.ctypeslib.as_array(pointer, shape=(self.vocabulary,))
        return self.choose(torch.from_numpy(logits.copy()))


def version() -> str:
    """llama-cpp-python's version and the instruction sets its build uses."""
    import llama_cpp

    info = llama_cpp.llama_print_system_info().decode()
    used = [
        name
        for name in ("AVX512_VNNI", "AVX512_BF16", "AMX_INT8", "AVX2", "NEON")
        if f"{name} = 1" in info
    ]
    return f"llama.cpp ({llama_cpp.__version__}; {', '.join(used) or 'plain'})"
