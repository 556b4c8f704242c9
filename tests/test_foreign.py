"""What others quantized, beside the original: the same tokens, the same numbers, or a reason."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab import pipeline
from quantlab.errors import ConfigError, ModelError
from quantlab.foreign import adopt
from quantlab.methods import configure, parse_variant, parse_variants
from quantlab.models import locate
from quantlab.plots.palette import variant_label
from quantlab.store import Store
from quantlab.types import RunSpec
from tests.tiny import saved

pytestmark = pytest.mark.usefixtures("exact", "home")

SMALL = {
    "group_size": 32,
    "calibration_tokens": 64,
    "calibration_length": 16,
    "eval_tokens": 128,
    "window": 64,
    "max_new_tokens": 4,
}


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return saved(tmp_path / "original", tied=True)


def spec_of(model: Path, *variants: str) -> RunSpec:
    return RunSpec(model=str(model), variants=parse_variants(",".join(variants)), **SMALL)  # type: ignore[arg-type]


def written(model: Path, text: str, format: str) -> Path:
    variant = parse_variant(text)
    out = model.parent / f"{text.replace(':', '-')}-{format}"
    out = out.with_suffix(".gguf") if format == "gguf" else out
    return pipeline.quantize(spec_of(model, text), variant, out, format)


def test_a_checkpoint_measures_as_the_method_that_wrote_it(original: Path) -> None:
    """In every format and in one comparison, answers included; and alone as a model."""
    folders = [
        written(original, "rtn:4", "gptq"),
        written(original, "rtn:4", "awq"),
        written(original, "rtn:4", "compressed-tensors"),
        written(original, "rtn:4", "quantlab"),
    ]
    names = ["bf16", "rtn:4", *(f"checkpoint:{folder}" for folder in folders)]
    spec = spec_of(original, *names)
    records = pipeline.compare(RunSpec(**{**spec_fields(spec), "prompts": ("the sea",)}))
    assert [record.status for record in records] == ["finished"] * 6, [r.error for r in records]
    wanted = records[1]
    for folder, record in zip(folders, records[2:], strict=True):
        assert record.method == "checkpoint"
        assert record.config == {"path": str(folder)}
        assert (record.bits, record.activation_bits) == (4, 16)
        assert record.perplexity == wanted.perplexity
        assert record.kl_divergence == wanted.kl_divergence
        assert record.execution == "packed"
        assert [o.text for o in record.outputs] == [o.text for o in wanted.outputs]
        assert record.quantize_seconds is None
    assert records[2].details["checkpoint"]["format"] == "gptq"
    _, alone = pipeline.evaluate(spec_of(folders[0], "bf16"))
    # Without an original to compare with, losses are summed elsewhere, in float32.
    assert alone.perplexity == pytest.approx(wanted.perplexity, rel=1e-6)
    assert alone.method == "checkpoint"
    again = pipeline.compare(spec)
    assert [record.status for record in again] == ["finished"] * 6


def spec_fields(spec: RunSpec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in RunSpec.__dataclass_fields__}


def test_a_gguf_file_is_a_variant_too(original: Path) -> None:
    file = written(original, "gguf:q8_0", "gguf")
    records = pipeline.compare(spec_of(original, "gguf:q8_0", f"checkpoint:{file}"))
    assert [record.status for record in records] == ["finished"] * 2, [r.error for r in records]
    assert records[1].bits == 8
    assert records[1].perplexity == records[0].perplexity
    assert "llama.cpp" in str(records[1].kernel)


def test_other_words_and_other_rows_are_refused(original: Path) -> None:
    folder = written(original, "rtn:4", "awq")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    (first, a), (second, b) = sorted(vocabulary.items(), key=lambda item: item[1])[200:202]
    vocabulary |= {first: b, second: a}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"another tokenizer than .* \(2 of 384 tokens differ\)"):
        adopt(str(folder), locate(str(original)))

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    stored = load_file(folder / "model.safetensors")
    stored["model.embed_tokens.weight"] = stored["model.embed_tokens.weight"][:300].clone()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"vocabulary of 300, .* of 384"):
        adopt(str(folder), locate(str(original)))
    record = pipeline.compare(spec_of(original, f"checkpoint:{folder}"))[0]
    assert record.status == "failed"
    assert "vocabulary of 300" in str(record.error)


def test_a_folder_without_a_tokenizer_is_compared_by_the_originals(original: Path) -> None:
    folder = written(original, "rtn:4", "gptq")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    record = pipeline.compare(spec_of(original, f"checkpoint:{folder}"))[0]
    assert record.status == "finished", record.error


def test_what_is_measured_follows_the_files(original: Path) -> None:
    """The same path with other weights is another variant, not the cached one."""
    folder = written(original, "rtn:4", "gptq")
    spec = spec_of(original, f"checkpoint:{folder}")
    store = Store()
    first = pipeline.compare(spec, store=store)[0]
    assert pipeline.compare(spec, store=store)[0].cached
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.scales"
    stored[name] = stored[name] * 2
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    second = pipeline.compare(spec, store=store)[0]
    assert not second.cached
    assert second.perplexity != first.perplexity


def test_plain_folders_and_missing_ones_are_refused_before_a_run(original: Path) -> None:
    for path, words in (
        (original, "is not quantized; compare it as --model"),
        (original / "nowhere.gguf", "no such file or folder"),
    ):
        with pytest.raises(ConfigError, match=f"^methods: checkpoint: .*{words}"):
            pipeline.validate(spec_of(original, f"checkpoint:{path}"))


def test_formats_refuse_before_the_model_is_loaded(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("quantlab.single.load", never)
    monkeypatch.setattr("quantlab.variants.load", never)
    for text, format, words in (
        ("awq:3", "awq", "4 bits, not 3"),
        ("nf4", "compressed-tensors", "no codebooks"),
        ("gptq:4:group_size=64", "gptq", "do not divide 96 columns"),
        ("gptq:4", "marlin", "choose quantlab, gguf, gptq, awq, compressed-tensors"),
    ):
        out = tmp_path / "out"
        with pytest.raises(ConfigError, match=words):
            pipeline.quantize(spec_of(original, text), parse_variant(text), out, format)
        assert not out.exists()


@pytest.mark.parametrize(
    ("text", "path", "label", "short"),
    [
        ("checkpoint:a/b-gptq", "a/b-gptq", "checkpoint:a/b-gptq", "Checkpoint b-gptq"),
        ("checkpoint:path=a/b/", "a/b/", "checkpoint:a/b/", "Checkpoint b"),
        ("checkpoint:D:\\m\\q.gguf", "D:\\m\\q.gguf", "checkpoint:D:\\m\\q.gguf", None),
        ("checkpoint", "", "checkpoint", "Checkpoint"),
    ],
)
def test_how_a_checkpoint_is_named(text: str, path: str, label: str, short: str | None) -> None:
    spec = parse_variant(text)
    assert configure(spec).path == path
    assert spec.label == label
    assert parse_variant(spec.label) == spec
    assert variant_label(label) == (short or "Checkpoint q.gguf")


def test_act_order_runs_packed_but_not_in_the_native_decoder(original: Path) -> None:
    from quantlab.export import checkpoint_reader
    from quantlab.native_records import refusal

    folder = written(original, "rtn:4", "gptq")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.g_idx"
    stored[name] = stored[name].flip(0)[torch.randperm(64, generator=torch.Generator())]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = checkpoint_reader.read(folder)
    assert "act-order" in str(refusal(model.module))
    record = pipeline.compare(spec_of(original, f"checkpoint:{folder}"))[0]
    assert (record.status, record.execution) == ("finished", "packed")
    assert any("act-order" in fallback for fallback in record.fallbacks)


def test_a_quantized_model_of_the_hub(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the local cache, as the Hub's client lays it out; no network."""
    folder = written(original, "rtn:4", "gptq")
    snapshot = tmp_path / "cache" / "models--someone--tiny-gptq" / "snapshots" / "abc123"
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("hf_hub_download", "snapshot_download", "try_to_load_from_cache"):
        real = getattr(huggingface_hub, name)
        cached = functools.partial(real, cache_dir=str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub, name, cached)
    name = "someone/tiny-gptq"
    local, remote = pipeline.compare(
        spec_of(original, f"checkpoint:{folder}", f"checkpoint:{name}")
    )
    assert (local.status, remote.status) == ("finished", "finished"), remote.error
    assert remote.perplexity == local.perplexity
    assert (remote.bits, remote.config) == (4, {"path": name})
    with pytest.raises(ModelError, match="compare it with its original as checkpoint:someone"):
        pipeline.compare(spec_of(Path(name), "bf16"))
