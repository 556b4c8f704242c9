"""llama.cpp as the engine of GGUF files, in a process of its own (see `llamacpp_process`).

Tokens go in as ids from the model's own tokenizer, so that every variant reads the same windows. A
crash of llama.cpp is an error of this variant, not of the whole run.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantlab
from quantlab.engine import Choose, greedy
from quantlab.errors import MethodError, ModelError
from quantlab.metrics.memory import peak_rss_bytes

BUILD_SECONDS = 60
"""The library loads in less than one."""


def build_info() -> str:
    """llama-cpp-python's version and the instruction sets of its build, asked in another process.

    Raises: OSError, subprocess.SubprocessError where it does not load."""
    done = subprocess.run(
        [sys.executable, "-m", "quantlab.llamacpp_process", "info"],
        cwd=Path(quantlab.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=True,
    )
    return done.stdout.strip().splitlines()[-1]


class LlamaCpp:
    """A GGUF file in llama.cpp: logits of whole windows, and decoding token by token.

    `choose` picks the next token from the logits; `info` names version and instruction sets. Close
    it when done. Raises: ModelError when llama.cpp refuses the file, MethodError when it dies.
    """

    def __init__(self, path: Path, threads: int, context: int = 2048, every: bool = False) -> None:
        self.choose: Choose = greedy
        self.context = context
        self._name = path.name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "quantlab.llamacpp_process"),
                *(str(path.resolve()), str(threads), str(context), str(int(every))),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=Path(quantlab.__file__).parents[1],
        )
        try:
            ready = self._answer()
        except MethodError as error:
            raise ModelError(f"model: {error}") from None
        if "error" in ready:
            self.close()
            raise ModelError(f"model: llama.cpp cannot load {path.name} ({ready['error']})")
        self.vocabulary, self.info = int(ready["vocabulary"]), str(ready["info"])

    def close(self) -> None:
        """End the process; safe to call twice."""
        if self._process.poll() is None:
            self._hang_up()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._hang_up()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def _hang_up(self) -> None:
        """Close the process's input; what it will not read any more does not matter."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def peak_rss_bytes(self) -> int:
        """Largest resident memory of llama.cpp's process so far."""
        return peak_rss_bytes(self._process.pid)

    def chunks(self, window: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first position, float32 logits [positions, vocabulary]); needs `every=True`."""
        self._ask({"op": "window", "ids": window.tolist()})
        while "done" not in (answer := self._answer()):
            yield int(answer["start"]), self._logits(answer)

    def prefill(self, ids: Sequence[int]) -> int:
        """Read a prompt from the start; the id of the next token."""
        return self._read(list(ids), True)

    def step(self, token: int) -> int:
        """Read one more token; the id of the next one."""
        return self._read([token], False)

    def timed(self, ids: Sequence[int], tokens: int) -> tuple[float, float]:
        """Seconds to read a prompt, its next token included, and for `tokens` greedy ones after it,
        by the clock of llama.cpp's process."""
        self._ask({"op": "time", "ids": list(ids), "tokens": tokens})
        answer = self._answer()
        return float(answer["prompt"]), float(answer["decode"])

    def _read(self, ids: list[int], reset: bool) -> int:
        sampled = self.choose is not greedy
        self._ask({"op": "read", "ids": ids, "reset": reset, "logits": sampled})
        answer = self._answer()
        return self.choose(self._logits(answer)[0]) if sampled else int(answer["token"])

    def _ask(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._dead() from None

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._dead()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _logits(self, answer: dict[str, Any]) -> Tensor:
        assert self._process.stdout is not None
        data = bytearray(answer["bytes"])
        view, filled = memoryview(data), 0
        while filled < len(data):
            count = self._process.stdout.readinto1(view[filled:])  # type: ignore[attr-defined]
            if not count:
                raise self._dead()
            filled += count
        return torch.frombuffer(data, dtype=torch.float32).view(answer["rows"], -1)

    def _dead(self) -> MethodError:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        last = f": {lines[-1][:200]}" if lines else ""
        return MethodError(
            f"llama.cpp {how} while running {self._name}{last}",
            "see whether llama-cpp-python was compiled on this machine; reinstall it if not",
        )
