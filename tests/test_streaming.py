"""Quantizing block by block from the files gives what quantizing the model in memory gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab import variants
from quantlab.errors import ModelError
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.models import LoadedModel, ModelSource, load, locate, stream
from quantlab.models import streaming as module
from quantlab.types import RunSpec, ignore
from quantlab.variants import prepare_variant
from tests.tiny import (
    FAMILIES,
    FEW,
    logits,
    saved,
    token_ids,
)

IDS = token_ids(4, 24)
SPEC = RunSpec(group_size=32, threads=1)
STREAMED = [
    name
    for name, method in METHODS.items()
    if method.packs and not method.whole_model(configure(parse_variant(name)))
]
VARIANTS = [
    *STREAMED, "gptq:3", "gptq:4:embedding_bits=8", "gguf:q4_0:imatrix=true",
    "mixed:arithmetic=awq", "mixed:preset=all-4:pattern=*.down_proj=16",
]  # fmt: skip


def whole(source: ModelSource, **settings: Any) -> LoadedModel:
    return load(source, **settings)


def contents(folder: Path) -> dict[str, Any]:
    """Every file of an artifact: tensors by name and dtype, whichever file they are in; texts."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors":
            for name, tensor in load_file(file).items():
                assert name not in found
                found[name] = (str(tensor.dtype), tuple(tensor.shape), tensor.flatten().tolist())
        elif file.name == "about.json":
            about = json.loads(file.read_text())
            found["about"] = {k: v for k, v in about.items() if k not in ("seconds", "peak_rss")}
        elif file.is_file():
            found[file.name] = file.read_bytes()
    return found


def quantized(text: str, source: ModelSource, folder: Path) -> dict[str, Any]:
    prepare_variant(parse_variant(text), source, IDS, folder, SPEC, ignore)
    return contents(folder)


# --- the same artifact -------------------------------------------------------------------------


def test_what_streams() -> None:
    """Everything but what trains end to end, ONNX Runtime's own and peers; a budget is measured."""
    others = {"bf16", "fp32", "checkpoint", "efficientqat", "qat", "onnx_int8"}
    others |= {name for name, method in METHODS.items() if method.peer is not None}
    assert set(METHODS) - set(STREAMED) == others
    mixed = parse_variant("mixed:budget=4.5")
    assert METHODS["mixed"].whole_model(configure(mixed))


CASES = [
    *(("llama", text) for text in VARIANTS),
    # llama.cpp has Gemma 3's windows in one order, which takes six blocks.
    *((name, "gguf:q8_0") for name in FEW if name not in ("llama", "gemma3")),
    *((name, t) for name in FEW if name != "llama" for t in ("gptq:4", "awq:4", "smoothquant:8")),
    ("gpt2", "mixed:preset=all-4:pattern=*.c_proj=16"),
]


@pytest.mark.parametrize(("name", "text"), CASES)
def test_the_artifact_is_the_same(
    name: str, text: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: packed weights, plain weights, sizes, configuration, tokenizer; GGUF files."""
    source = locate(str(saved(tmp_path / "model", name, seed=4)))
    streamed: list[bool] = []
    real = variants.stream

    def watched(*args: Any, **settings: Any) -> LoadedModel:
        model = real(*args, **settings)
        streamed.append(model.files is not None)
        return model

    monkeypatch.setattr(variants, "stream", watched)
    found = quantized(text, source, tmp_path / "streamed")
    assert streamed == [True]
    monkeypatch.setattr(variants, "stream", whole)
    wanted = quantized(text, source, tmp_path / "whole")
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if found[key] != wanted[key]] == []


# --- what is in memory -------------------------------------------------------------------------


def numbers(model: LoadedModel) -> list[bool]:
    """Whether each block's weights are in memory."""
    blocks: Any = model.module.get_submodule(model.family.blocks)
    return [not any(p.is_meta for p in block.parameters()) for block in blocks]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_streamed_model_is_the_loaded_one(name: str, tmp_path: Path) -> None:
    source = locate(str(saved(tmp_path / "model", name, seed=2)))
    model, wanted = stream(source), load(source)
    assert numbers(model) == [False, False]
    assert (model.family, model.notes, model.source) == (wanted.family, wanted.notes, wanted.source)
    assert model.parameters == wanted.parameters
    for index in (0, 1):
        model.fetch(index)
    assert numbers(model) == [True, True]
    state, other = model.module.state_dict(), wanted.module.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in other)
    assert torch.equal(logits(model.module, IDS), logits(wanted.module, IDS))
    assert not any(p.requires_grad for p in model.module.parameters())


def test_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a block is worked on, those behind it are still on disk, and those before it hold
    nothing but vectors and views of files."""
    source = locate(str(saved(tmp_path / "model")))
    method, seen = METHODS["rtn"], []
    models: list[LoadedModel] = []
    real, quantize = variants.stream, type(method).quantize_block

    def watched(*args: Any, **settings: Any) -> LoadedModel:
        models.append(real(*args, **settings))
        return models[-1]

    def block(self: Any, block: Any, stats: Any, config: Any) -> Any:
        seen.append(numbers(models[0]))
        if block.index == 1:
            first = models[0].module.model.layers[0]
            assert all(p.dim() == 1 for p in first.parameters())
            assert all(m.resting for m in first.modules() if hasattr(m, "resting"))
        return quantize(self, block, stats, config)

    monkeypatch.setattr(variants, "stream", watched)
    monkeypatch.setattr(type(method), "quantize_block", block)
    prepare_variant(parse_variant("rtn"), source, None, tmp_path / "out", SPEC, ignore)
    assert seen == [[True, False], [True, True]]
    assert not (tmp_path / "out" / "blocks").exists()


# --- where weights lie -------------------------------------------------------------------------


def resaved(folder: Path, change: Any, shards: int = 1) -> ModelSource:
    """The tiny model's tensors after `change`, in so many files."""
    saved(folder, "llama", seed=3)
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    tensors = change(tensors)
    if shards > 1:
        (folder / "model.safetensors").unlink()
        names, table = sorted(tensors), {}
        for index in range(shards):
            file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
            part = names[index::shards]
            save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
            table |= dict.fromkeys(part, file)
        index_file = folder / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return locate(str(folder))


def same(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


@pytest.mark.parametrize(
    ("change", "shards"),
    [
        (same, 3),
        (lambda t: {k: v.bfloat16() for k, v in t.items()}, 2),
        (lambda t: {k.removeprefix("model."): v for k, v in t.items()}, 1),
        (lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, 1),
    ],
    ids=["shards", "bfloat16", "without prefix", "more than needed"],
)
def test_files_of_other_shapes_stream_alike(change: Any, shards: int, tmp_path: Path) -> None:
    source = resaved(tmp_path / "model", change, shards)
    model, wanted = stream(source), load(source)
    assert model.files is not None
    for index in (0, 1):
        model.fetch(index)
    assert torch.equal(logits(model.module, IDS), logits(wanted.module, IDS))


def test_ties_are_kept(tmp_path: Path) -> None:
    model = stream(locate(str(saved(tmp_path / "model", tied=True))))
    assert model.files is not None
    embedding, head = model.module.get_input_embeddings(), model.module.get_output_embeddings()
    assert head.weight is embedding.weight


def test_what_cannot_be_streamed_is_loaded_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path / "pickle")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    model = stream(locate(str(folder), allow_pickle=True), allow_pickle=True)
    assert model.files is None
    assert numbers(model) == [True, True]


def test_incomplete_files_are_refused_as_ever(tmp_path: Path) -> None:
    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}

    source = resaved(tmp_path / "model", without)
    with pytest.raises(ModelError, match=r"incomplete: 1 tensors are missing.*up_proj"):
        stream(source)


def test_an_index_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    source = resaved(tmp_path / "model", same, 2)
    assert source.path is not None
    assert len(module.weight_files(source.path)) == 2
    outside = tmp_path / "elsewhere.safetensors"
    outside.write_bytes((source.path / "model-00001-of-00002.safetensors").read_bytes())
    index = source.path / module.INDEX
    for name in ("../elsewhere.safetensors", str(outside), "gone.safetensors"):
        document = json.loads(index.read_text())
        document["weight_map"]["model.norm.weight"] = name
        index.write_text(json.dumps(document))
        assert module.weight_files(source.path) == []


def test_files_that_vanish_meanwhile(tmp_path: Path) -> None:
    source = locate(str(saved(tmp_path / "model")))
    model = stream(source)
    assert source.path is not None
    (source.path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read any more"):
        model.fetch(1)


def test_the_hub_s_cache_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the Hub's client lays it out: links in a snapshot's folder."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "hub" / "models--someone--tiny"
    saved(root / "snapshots" / commit)
    source = ModelSource("someone/tiny", "hub", None, f"hub:{commit}")

    def cached(name: str, file: str, **_: Any) -> Path | None:
        found = root / "snapshots" / commit / file
        return found if found.exists() else None

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached)
    model = stream(source)
    assert model.files is not None
    assert numbers(model) == [False, False]
