"""llama.cpp in a process of its own.

    python -m quantlab.llamacpp_process FILE THREADS CONTEXT EVERY
    python -m quantlab.llamacpp_process info            # prints `system_info()`

Requests come as JSON lines on standard input, answers go to standard output: a JSON line, and where
it names `bytes` that many raw bytes of float32 logits after it. Ends when its input ends.

    {"op": "window", "ids": […]}                    -> one answer for each batch of positions
    {"op": "time", "ids": […], "tokens": n}         -> {"prompt": seconds, "decode": seconds}
    {"op": "read", "ids": […], "reset": bool, "logits": bool}    -> {"token": id} or the logits

Why a process: a crash in native code (seen: an illegal instruction) then costs one variant and not
the run, its memory can be told apart, and the OpenMP teams of ggml and torch do not meet. So it
imports neither torch nor anything that does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, BinaryIO

import numpy as np

BATCH = 512


class Server:
    """Answers requests on a loaded model."""

    def __init__(self, llama: Any, output: BinaryIO) -> None:
        self.llama, self.output = llama, output

    def tell(self, answer: dict[str, Any], data: np.ndarray[Any, Any] | None = None) -> None:
        if data is not None:
            answer["bytes"] = data.nbytes
        self.output.write(json.dumps(answer).encode() + b"\n")
        if data is not None:
            self.output.write(np.ascontiguousarray(data).tobytes())
        self.output.flush()

    def handle(self, request: dict[str, Any]) -> None:
        ids = request["ids"]
        if request["op"] == "window":
            self.llama.reset()
            self.llama.eval(ids)
            for start in range(0, len(ids), BATCH):
                stop = min(start + BATCH, len(ids))
                self.tell({"start": start, "rows": stop - start}, self.llama.scores[start:stop])
            self.tell({"done": True})
            return
        if request["op"] == "time":
            self.llama.reset()
            began = time.perf_counter()
            token = int(self.read(ids).argmax())
            first = time.perf_counter()
            for _ in range(request["tokens"]):
                token = int(self.read([token]).argmax())
            self.tell({"prompt": first - began, "decode": time.perf_counter() - first})
            return
        if request["reset"]:
            self.llama.reset()
        logits = self.read(ids)
        if request["logits"]:
            self.tell({"rows": 1}, logits)
        else:
            self.tell({"token": int(logits.argmax())})

    def read(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Read tokens after those read so far; float32 logits [vocabulary] after the last."""
        import llama_cpp

        self.llama.eval(ids)
        pointer = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.llama.n_vocab(),))


def system_info() -> str:
    """llama-cpp-python's version and the instruction sets its build uses."""
    import llama_cpp

    info = llama_cpp.llama_print_system_info().decode()
    names = ("AVX2", "AVX512_VNNI", "AVX512_BF16", "AMX_INT8", "NEON")
    used = ", ".join(name for name in names if f"{name} = 1" in info)
    return f"llama.cpp (llama-cpp-python {llama_cpp.__version__}; {used or 'plain'})"


def main(arguments: list[str]) -> int:
    if arguments == ["info"]:
        print(system_info())
        return 0
    path, threads, context, every = arguments
    # llama.cpp prints to file descriptor 1 now and then; answers go to a private copy of it.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import llama_cpp

    try:
        llama = llama_cpp.Llama(
            path,
            n_ctx=int(context),
            n_batch=BATCH,
            n_ubatch=BATCH,
            n_threads=int(threads),
            n_threads_batch=int(threads),
            logits_all=every == "1",
            verbose=False,
        )
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        output.write(json.dumps({"error": str(error)}).encode() + b"\n")
        output.flush()
        return 1
    server = Server(llama, output)
    server.tell({"vocabulary": llama.n_vocab(), "info": system_info()})
    for line in sys.stdin.buffer:
        server.handle(json.loads(line))
    llama.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
