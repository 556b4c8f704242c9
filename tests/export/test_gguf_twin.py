"""Whole files against those llama.cpp makes from the same F32 file, with and without importance.

Also the test of scripts/compare_gguf.py, which does this to a real model and measures both files.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quantlab.blockwise import quantize_blocks, quantize_outer
from quantlab.export import gguf
from quantlab.ggml.mixes import FILE_TYPES
from quantlab.methods import METHODS
from quantlab.methods.gguf import GGUFConfig
from quantlab.models import LoadedModel, load
from quantlab.models.gguf_header import read_header

from .conftest import ROWS, Make
from .oracle import llama_logits, window

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_gguf.py"
IDS = torch.randint(2, ROWS, (4, 32), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("compare_gguf", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module, before = importlib.util.module_from_spec(spec), list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def ours(model: LoadedModel, type: str, imatrix: bool, path: Path) -> Path:
    """QuantLab's file; `model` is left as it was."""
    model = load(model.source.name)
    config = GGUFConfig(type=type, imatrix=imatrix)
    packed = quantize_blocks(model, METHODS["gguf"], config, IDS, lambda done, total: None)
    outer = quantize_outer(model, METHODS["gguf"], config)
    return gguf.write(path, model, packed, outer, type)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="ggml may fuse elsewhere")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_files_are_llama_cpps_byte_for_byte(
    tied: bool, make: Make, tmp_path: Path, script: ModuleType
) -> None:
    """The mix, the order of rows, the importance of each matrix and what embedding and head get:
    all of it must agree. 8 blocks, so that rules for the first and the last ones show."""
    model = make(
        "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=8,
        tie_word_embeddings=tied,
    )  # fmt: skip
    original = ours(model, "f32", False, tmp_path / "f32.gguf")
    importance = script.importance_of(model, IDS)
    assert len(importance) == 7 * 8
    theirs, previous = tmp_path / "theirs.gguf", {}
    for imatrix in (False, True):
        for type in ("q4_0", "iq4_nl", "q3_k_m", "q2_k"):
            mine = ours(model, type, imatrix, tmp_path / "ours.gguf")
            script.llama_quantize(original, theirs, type, importance if imatrix else None)
            assert script.differing_tensors(mine, theirs) == [], (type, imatrix)
            fields = read_header(mine).fields
            assert fields["general.file_type"].values == [FILE_TYPES[type].ftype]
            found = llama_logits(mine, window())
            assert bool(found.isfinite().all())
            if imatrix:
                assert not torch.equal(found, previous[type])
            previous[type] = found


def test_differing_tensors_are_named(make: Make, tmp_path: Path, script: ModuleType) -> None:
    model = make("llama")
    a, b = (ours(model, type, False, tmp_path / f"{type}.gguf") for type in ("q4_0", "q5_0"))
    assert script.differing_tensors(a, a) == []
    different = script.differing_tensors(a, b)
    assert "blk.0.attn_q.weight" in different
    assert "output_norm.weight" not in different
