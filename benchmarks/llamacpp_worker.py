"""llama.cpp quantizes a GGUF file with its own `llama_model_quantize`; QuantLab's Python runs this.

Its seconds are of the whole call: reading the float file, quantizing, and writing the new one.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize a GGUF file with llama.cpp.")
    parser.add_argument("--model", type=Path, required=True, help="a float GGUF file")
    parser.add_argument("--type", default="Q4_K_M", help="its name after LLAMA_FTYPE_MOSTLY_")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is written")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread = given.threads
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{given.type}")
    runs = []
    for _ in range(given.repeat):
        written = given.out / "model.gguf"
        started = time.perf_counter()
        failed = llama_cpp.llama_model_quantize(
            bytes(given.model), bytes(written), ctypes.byref(settings)
        )
        runs.append(time.perf_counter() - started)
        if failed:
            raise SystemExit(f"llama_model_quantize returned {failed}")
    facts = {
        "peer": f"llama.cpp (llama-cpp-python {importlib.metadata.version('llama_cpp_python')})",
        "seconds": sorted(runs)[len(runs) // 2],
        "runs": runs,
        "blocks": None,
        "settings": f"llama_model_quantize, {given.threads} threads, reading and writing included",
    }
    (given.out / "report.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
