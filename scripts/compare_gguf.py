"""QuantLab's GGUF files beside llama.cpp's own, in llama.cpp: perplexity and KL divergence.

    .venv/bin/python scripts/compare_gguf.py --text FILE --calibration FILE --json OUT.json

Both start from the same weights: llama.cpp's `llama_model_quantize` reads the F32 file that
QuantLab writes, and is given the importance that QuantLab measured. Where every tensor is the same
byte for byte, one measurement serves both. Takes about a minute a file on two quiet cores.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from quantlab.blockwise import quantize_outer  # noqa: E402
from quantlab.calibration import ActStats, BlockRunner  # noqa: E402
from quantlab.environment import default_threads, machine  # noqa: E402
from quantlab.export import gguf  # noqa: E402
from quantlab.ggml.mixes import FILE_TYPES  # noqa: E402
from quantlab.methods import METHODS  # noqa: E402
from quantlab.methods.gguf import GGUFConfig  # noqa: E402
from quantlab.metrics.quality import measure_quality, reference_states  # noqa: E402
from quantlab.models import (  # noqa: E402
    Block,
    LoadedModel,
    ModelSource,
    block_list,
    get_block,
    load,
    locate,
)
from quantlab.runners import LlamaCppRunner  # noqa: E402
from quantlab.texts import tokenize  # noqa: E402
from quantlab.types import ignore  # noqa: E402

PLAIN = "q8_0,q6_k,q5_k_m,q4_k_m,q4_0,q4_1,iq4_nl,q3_k_m,q2_k"
WEIGHED = "q4_k_m,q4_0,iq4_nl,q3_k_m,q2_k"


def main() -> None:
    arguments = parse()
    threads = arguments.threads or default_threads()
    torch.set_num_threads(threads)
    source = locate(arguments.model)
    model = load(source)
    text = tokenize(model.tokenizer, arguments.text, "evaluation")
    windows = text.windows(arguments.eval_tokens, arguments.window)
    reference = reference_states(model, windows, text.bos, ignore)
    calibration = tokenize(model.tokenizer, arguments.calibration, "calibration")
    ids = calibration.spread(arguments.calibration_tokens, 512)
    results: list[dict[str, Any]] = []

    def measured(path: Path) -> dict[str, Any]:
        runner = LlamaCppRunner(path, text.bos, threads, max(2048, arguments.window + 1))
        try:
            quality = measure_quality(runner, windows, reference, path.stem, ignore)
        finally:
            runner.close()
        return {
            "perplexity": quality.perplexity,
            "kl_divergence": quality.kl_divergence,
            "kl_divergence_ci": quality.kl_divergence_ci,
            "top1_agreement": quality.top1_agreement,
            "size_bytes": gguf.weight_bytes(path),
        }

    def keep(type: str, imatrix: bool, maker: str, figures: dict[str, Any]) -> None:
        row = {"type": type, "imatrix": imatrix, "maker": maker, **figures}
        results.append(row)
        print(
            f"{type:8} {'imatrix' if imatrix else '':8} {maker:10} "
            f"perplexity {row['perplexity']:8.3f}   KL {row['kl_divergence']:.4f}   "
            f"{row['size_bytes'] / 1e6:5.0f} MB   {row.get('note', '')}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original = ours(source, "f32", None, folder / "f32.gguf")
        importance = importance_of(model, ids) if arguments.weighed else {}
        del model
        for type, imatrix in chosen(arguments):
            weighed = importance if imatrix else None
            mine = ours(source, type, weighed, folder / "ours.gguf")
            theirs = folder / "theirs.gguf"
            llama_quantize(original, theirs, type, weighed)
            different = differing_tensors(mine, theirs)
            figures = measured(mine)
            note = f"{len(different)} tensors differ" if different else "the same bytes in both"
            keep(type, imatrix, "QuantLab", {**figures, "note": note})
            keep(type, imatrix, "llama.cpp", measured(theirs) if different else figures)
    if arguments.json:
        about = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(arguments).items()}}
        document = {"schema": 1, **about, "results": results}
        arguments.json.write_text(json.dumps(document, indent=1), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--text", default="project", help="name or file that is evaluated")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--calibration", default="project", help="name or file for importance")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--types", default=PLAIN, help="without importance, separated by commas")
    parser.add_argument("--weighed", default=WEIGHED, help="with importance")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for type, _ in chosen(arguments):
        if type not in FILE_TYPES:
            parser.error(f"unknown GGUF type {type!r}; known: {', '.join(FILE_TYPES)}")
    return arguments


def chosen(arguments: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """(type, with importance), those of one type together."""
    plain, weighed = (
        [name for name in given.split(",") if name]
        for given in (arguments.types, arguments.weighed)
    )
    for name in dict.fromkeys(plain + weighed):
        yield from (
            (name, flag) for flag, given in ((False, plain), (True, weighed)) if name in given
        )


@torch.no_grad()
def ours(
    source: ModelSource, type: str, importance: Mapping[str, Tensor] | None, path: Path
) -> Path:
    """QuantLab's file of this type; `quantize_blocks` without measuring the importance again."""
    model, method, packed = load(source), METHODS["gguf"], {}
    config = GGUFConfig(type=type, imatrix=importance is not None)
    for index in range(len(block_list(model.module, model.family))):
        block = get_block(model.module, model.family, index)
        stats = {
            linear: ActStats(0, mean_square=importance[tensor_name(block, linear)])
            for linear in (block.linears if importance is not None else ())
        }
        for linear, weight in method.quantize_block(block, stats, config).items():
            packed[f"{model.family.blocks}.{index}.{linear}"] = weight
    return gguf.write(path, model, packed, quantize_outer(model, method, config), type)


def tensor_name(block: Block, path: str) -> str:
    return f"blk.{block.index}.{block.kinds[path]}.weight"


@torch.no_grad()
def importance_of(model: LoadedModel, ids: Tensor) -> dict[str, Tensor]:
    """Mean square of each matrix's inputs in the unquantized model, by its name in the file."""
    runner, found = BlockRunner(model, ids), {}
    for index in range(len(block_list(model.module, model.family))):
        block = get_block(model.module, model.family, index)
        for path, stats in runner.collect(block, ["square"], advance=True).items():
            assert stats.mean_square is not None
            found[tensor_name(block, path)] = stats.mean_square
    return found


def llama_quantize(
    source: Path, target: Path, type: str, importance: Mapping[str, Tensor] | None
) -> None:
    """llama.cpp's own file."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, FILE_TYPES[type].ftype
    if importance:
        entries = []
        for name, values in importance.items():
            data = (ctypes.c_float * len(values))(*values.tolist())
            entries.append(llama_cpp.llama_model_imatrix_data(name.encode(), data, len(values)))
        entries.append(llama_cpp.llama_model_imatrix_data(None, None, 0))
        params.imatrix = (llama_cpp.llama_model_imatrix_data * len(entries))(*entries)
    with quietly() as words:
        code = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(params)
        )
        words.seek(0)
        said = words.read().decode(errors="replace").strip().rpartition("\n")[2]
    if code:
        sys.exit(f"llama_model_quantize ended with {code} for {type}: {said}")


@contextmanager
def quietly() -> Iterator[IO[bytes]]:
    """What C code prints goes to a file, which the caller may read."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as words:
        for number in (1, 2):
            os.dup2(words.fileno(), number)
        try:
            yield words
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def differing_tensors(a: Path, b: Path) -> list[str]:
    """Names of tensors whose type or bytes differ."""
    left, right = gguf.read(a), gguf.read(b)
    return [
        name
        for name in left.keys() | right.keys()
        if name not in left
        or name not in right
        or left[name].type != right[name].type
        or not torch.equal(left[name].data, right[name].data)
    ]


if __name__ == "__main__":
    main()
