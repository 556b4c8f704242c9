"""The whole flow on tiny folders: records, caches, failures, artifacts, answers, delivery."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab import estimate, pipeline
from quantlab.errors import ConfigError, MethodError, ModelError, TextError
from quantlab.methods import METHODS, parse_variants
from quantlab.models import load
from quantlab.results import ResultRecord
from quantlab.store import Store
from quantlab.texts import tokenize
from quantlab.types import Event, Notice, OutputDelta, Progress, RunSpec, VariantFinished
from tests import tiny

SPEC = RunSpec(
    group_size=32,
    calibration_tokens=256,
    calibration_length=64,
    eval_tokens=192,
    window=64,
    prompts=("The river",),
    max_new_tokens=6,
    threads=1,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.saved(tmp_path / "model")


def spec_for(folder: Path, methods: str, **changes: Any) -> RunSpec:
    variants = parse_variants(methods)
    return dataclasses.replace(SPEC, model=str(folder), variants=variants, **changes)


def test_every_kind_of_variant_is_measured_on_the_same_windows(home: Path, folder: Path) -> None:
    events: list[Event] = []
    methods = "rtn:4,fp32,bf16,smoothquant:8,gptq:4,awq:4,gguf:q8_0"
    records = pipeline.compare(spec_for(folder, methods), store=Store(), emit=events.append)
    assert [record.variant for record in records] == methods.split(",")
    assert [(r.variant, r.error) for r in records if r.status != "finished"] == []
    by_label = {record.variant: record for record in records}

    # The original against itself: nothing differs, and its perplexity is transformers' own.
    model = load(str(folder))
    windows = tokenize(model.tokenizer, "project", "evaluation").windows(192, 64)
    total = 0.0
    for window in windows:
        logits = model.module(window[None]).logits[0, :-1].double()
        total -= float(logits.log_softmax(-1).gather(1, window[1:, None]).sum())
    expected = math.exp(total / (3 * 63))
    assert by_label["fp32"].perplexity == pytest.approx(expected, rel=1e-5)
    assert by_label["fp32"].kl_divergence == pytest.approx(0, abs=1e-6)
    assert by_label["fp32"].top1_agreement == 1.0

    # More bits lose less; sizes and bits count everything.
    losses = {label: record.kl_divergence for label, record in by_label.items()}
    assert losses["bf16"] < losses["gguf:q8_0"] < losses["rtn:4"]
    parameters = model.parameters
    assert by_label["bf16"].size_bytes == 2 * parameters
    assert by_label["fp32"].bits_per_weight == 32
    linears = sum(
        inner.weight.numel() for block in model.module.model.layers for inner in linears_of(block)
    )
    # 32 columns share 16 bits of scale and a 4-bit zero. Rows of 96 columns have three zeros, which
    # fill two bytes: half a byte more for each of the 64 rows of both down projections.
    packed = linears * (4 + 20 / 32) / 8 + 2 * 64 / 2
    assert by_label["rtn:4"].size_bytes == packed + 2 * (parameters - linears)
    for record in records:
        segments = record.segments
        assert len(segments["nll"]) == len(segments["kl"]) == 3  # the same for every engine
        assert record.environment["text"]["windows"] == 3
        # Token by token: the very divergences that the first segment is the mean of.
        reading = record.reading
        assert sum(reading["kl"]) / 63 == pytest.approx(segments["kl"][0], rel=1e-12)
        assert reading["tokens"] == windows[0].tolist()
        assert "".join(reading["text"]) == model.tokenizer.decode(windows[0])
        assert reading["original"] == by_label["fp32"].reading["original"]
        calibration = record.environment.get("calibration", {})
        widest = 96 if record.method in ("gptq", "awq") else None
        assert calibration.get("widest_input") == widest
        assert (record.execution == "simulated") == (record.decode_tokens_per_second is None)
    assert [e.variant for e in events if isinstance(e, VariantFinished)][:2] == ["fp32", "bf16"]
    fractions = [event.fraction for event in events if isinstance(event, Progress)]
    assert fractions == sorted(fractions)
    assert fractions[-1] <= 1


def linears_of(block: torch.nn.Module) -> list[torch.nn.Linear]:
    return [inner for inner in block.modules() if isinstance(inner, torch.nn.Linear)]


def test_fixed_activation_steps_are_in_the_record(home: Path, folder: Path) -> None:
    (record,) = pipeline.compare(spec_for(folder, "static_int8:8"), store=Store())
    found = record.details["static_inputs"]
    assert found["layer"].startswith("model.layers.")
    assert found["step"] >= found["median"] > 0


def test_streamed_text_is_the_recorded_text_and_divergence_counts_from_the_original(
    home: Path, folder: Path
) -> None:
    events: list[Event] = []
    spec = spec_for(folder, "rtn:2:group_size=64,fp32", prompts=("The river", "A glass"))
    records = pipeline.compare(spec, store=Store(), emit=events.append)
    for record in records:
        for index, output in enumerate(record.outputs):
            streamed = [
                event.text
                for event in events
                if isinstance(event, OutputDelta)
                and (event.variant, event.prompt) == (record.variant, index)
            ]
            assert "".join(streamed) == output.text == "".join(output.pieces)
            assert len(output.pieces) == len(output.tokens) <= spec.max_new_tokens
    rounded, original = records
    for ours, theirs in zip(rounded.outputs, original.outputs, strict=True):
        assert theirs.first_divergence is None
        pairs = zip(ours.tokens, theirs.tokens, strict=False)
        different = [index for index, (a, b) in enumerate(pairs) if a != b]
        assert ours.first_divergence == (different[0] if different else None)
    assert any(output.first_divergence is not None for output in rounded.outputs)


def test_a_second_run_is_cached_and_another_text_keeps_the_quantized_weights(
    home: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_for(folder, "fp32,rtn:4")
    first = pipeline.compare(spec, store=Store())
    again = pipeline.compare(spec, store=Store())
    assert [record.cached for record in again] == [True, True]
    for before, after in zip(first, again, strict=True):
        assert dataclasses.replace(after, cached=False) == before

    def refuse(*_: object) -> None:
        raise AssertionError("quantized again")

    monkeypatch.setattr(METHODS["rtn"], "quantize_block", refuse)
    text = tmp_path / "other.txt"
    text.write_text("Rain fell on the harbour. " * 60, encoding="utf-8")
    _, other = pipeline.compare(dataclasses.replace(spec, text=str(text)), store=Store())
    assert not other.cached
    assert other.artifact == first[1].artifact
    assert other.perplexity != first[1].perplexity
    moved = dataclasses.replace(spec, seed=1)
    assert pipeline.compare(moved, store=Store())[1].status == "failed"


def test_a_failing_method_is_a_row_and_the_others_finish(
    home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise MethodError("this matrix will not do", "try another")

    def run_out(*_: object) -> None:
        raise MemoryError

    def surprise(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(METHODS["gptq"], "quantize_block", explode)
    monkeypatch.setattr(METHODS["awq"], "quantize_block", run_out)
    monkeypatch.setattr(METHODS["smoothquant"], "quantize_block", surprise)
    store = Store()
    spec = spec_for(folder, "fp32,gptq:4,awq:4,smoothquant:8,rtn:4")
    fp32, gptq, awq, smooth, rtn = pipeline.compare(spec, store=store)
    assert (fp32.status, rtn.status) == ("finished", "finished")
    assert (gptq.status, gptq.error, gptq.hint) == (
        "failed",
        "this matrix will not do",
        "try another",
    )
    assert awq.error == "out of memory"
    assert smooth.error == "ZeroDivisionError: division by zero"
    assert gptq.perplexity is None
    # Nothing half-made stays behind, and the failed ones are tried again.
    monkeypatch.undo()
    monkeypatch.setenv("QUANTLAB_HOME", str(home))
    again = pipeline.compare(spec, store=store)
    assert [(r.status, r.cached) for r in again] == [
        ("finished", True),
        ("finished", False),
        ("finished", False),
        ("finished", False),
        ("finished", True),
    ]


def test_settled_variants_are_skipped_and_still_give_the_original(home: Path, folder: Path) -> None:
    store = Store()
    spec = spec_for(folder, "fp32,rtn:2:group_size=64")
    whole = pipeline.compare(spec, store=store)
    run = store.create_run(spec)
    store.add_record(run, whole[0])
    rest = pipeline.compare(spec, store=Store(home / "fresh"), run_id=None, skip=[])
    resumed = pipeline.compare(spec, store=store, run_id=run, skip=["fp32"])
    assert [record.variant for record in resumed] == ["rtn:2:group_size=64"]
    assert resumed[0].outputs == rest[1].outputs


def test_a_broken_model_fails_with_a_reason_instead_of_a_number(
    home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = METHODS["rtn"].quantize_block

    def poisoned(*arguments: Any) -> Any:
        packed = quantize(*arguments)
        path = next(iter(packed))
        weight: Any = packed[path]
        packed[path] = dataclasses.replace(weight, scales=weight.scales * float("nan"))
        return packed

    monkeypatch.setattr(METHODS["rtn"], "quantize_block", poisoned)
    (record,) = pipeline.compare(spec_for(folder, "rtn:4"), store=Store())
    assert record.status == "failed"
    assert "not a number" in str(record.error)
    json.dumps(record.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"variants": ()}, ConfigError, "at least one"),
        ({"variants": parse_variants("rtn:4") * 2}, ConfigError, "named twice"),
        ({"group_size": 0}, ConfigError, "group_size"),
        ({"window": 4}, ConfigError, "window"),
        ({"eval_tokens": 10}, ConfigError, "less than one window"),
        ({"calibration_length": 0}, ConfigError, "calibration_length"),
        ({"device": "tpu"}, ConfigError, "device"),
        ({"text": "nowhere.txt"}, TextError, "no such file"),
        ({"model": "nowhere/at/all"}, ModelError, "no such file or folder"),
        ({"window": 256, "eval_tokens": 256}, ConfigError, "context of 128"),
    ],
)
def test_wrong_input_is_refused_before_any_variant(
    home: Path, folder: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    events: list[Event] = []
    spec = dataclasses.replace(spec_for(folder, "rtn:4"), **changes)
    with pytest.raises(error, match=words):
        pipeline.compare(spec, store=Store(), emit=events.append)
    assert not [event for event in events if not isinstance(event, Progress | Notice)]


def test_a_trained_variant_packs_its_embedding_too(home: Path, folder: Path) -> None:
    """Training sends gradients through the head, so that it is packed only afterwards."""
    short = "block_epochs=1:e2e_epochs=1"
    spec = spec_for(
        folder, f"efficientqat:2:{short},efficientqat:2:embedding_bits=8:head_bits=8:{short}"
    )
    plain, packed = pipeline.compare(spec, store=Store())
    assert (plain.status, packed.status) == ("finished", "finished")
    assert plain.size_bytes is not None
    assert packed.size_bytes is not None
    assert packed.size_bytes < plain.size_bytes
    assert plain.curves == packed.curves


def test_evaluate_refuses_a_window_longer_than_the_context(home: Path, folder: Path) -> None:
    spec = spec_for(folder, "gguf:q8_0")
    written = pipeline.quantize(spec, spec.variants[0], folder.parent / "long.gguf", "gguf")
    for model in (folder, written):
        long = dataclasses.replace(spec, model=str(model), window=256, eval_tokens=256)
        with pytest.raises(ConfigError, match=r"window: 256.* context of 128"):
            pipeline.evaluate(long)


def test_a_text_shorter_than_one_window_is_refused(
    home: Path, folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("the cat sat on the mat and the dog lay down by the fire too", encoding="utf-8")
    with pytest.raises(TextError, match="too few for 64 tokens"):
        pipeline.validate(spec_for(folder, "rtn:4", text=str(text)))
    text.write_text("the the the the " * 6, encoding="utf-8")
    with pytest.raises(TextError, match="one window takes 64"):
        pipeline.compare(spec_for(folder, "rtn:4", text=str(text)), store=Store())


def test_only_an_importance_matrix_makes_gguf_depend_on_calibration(
    home: Path, folder: Path, tmp_path: Path
) -> None:
    """With another calibration text the plain file is the same artifact and the weighed one is not;
    the text is read, and named in the record, only where it is used."""
    other = tmp_path / "other.txt"
    other.write_text("Seven ships sailed west at dawn, and none of them came back. " * 200)

    def run(methods: str, calibration: Path | str) -> list[ResultRecord]:
        spec = spec_for(folder, methods, prompts=(), calibration=str(calibration))
        return pipeline.compare(spec, store=Store())

    first = run("gguf:q4_0,gguf:q4_0:imatrix=true", "project")
    second = run("gguf:q4_0,gguf:q4_0:imatrix=true", other)
    assert [record.error for record in first + second] == [None] * 4
    assert ["calibration" in record.environment for record in first] == [False, True]
    assert first[0].artifact == second[0].artifact
    assert second[0].cached
    assert len({first[0].artifact, first[1].artifact, second[1].artifact}) == 3
    assert not second[1].cached
    run("gguf:q4_0", tmp_path / "missing.txt")
    with pytest.raises(TextError, match="missing"):
        run("gguf:q4_0:imatrix=true", tmp_path / "missing.txt")


def test_answers_of_an_earlier_run_come_from_its_artifacts(home: Path, folder: Path) -> None:
    store = Store()
    spec = spec_for(folder, "fp32,rtn:4,gguf:q8_0")
    records = pipeline.compare(spec, store=store)
    asked = dataclasses.replace(spec, prompts=("A harbour", "The river"), max_new_tokens=5)
    events: list[Event] = []
    answered = pipeline.answer(records, asked, store=store, emit=events.append)
    assert [record.variant for record in answered] == ["fp32", "rtn:4", "gguf:q8_0"]
    for before, after in zip(records, answered, strict=True):
        assert after.status == "finished"
        # The river was asked in the comparison too, one variant at a time.
        assert after.outputs[1].tokens == before.outputs[0].tokens[:5]
        assert after.perplexity == before.perplexity
    # Side by side: each variant's second piece comes before any variant's last.
    deltas = [e.variant for e in events if isinstance(e, OutputDelta) and e.prompt == 0]
    assert set(deltas[:4]) == {"fp32", "rtn:4", "gguf:q8_0"}
    lost = dataclasses.replace(records[1], artifact="0" * 24)
    kept, gone, _ = pipeline.answer([records[0], lost, records[2]], asked, store=store)
    assert (kept.status, gone.status) == ("finished", "failed")
    assert "no longer kept" in str(gone.error)


def test_answers_are_refused_when_the_model_has_changed(home: Path, folder: Path) -> None:
    store = Store()
    spec = spec_for(folder, "fp32")
    records = pipeline.compare(spec, store=store)
    tiny.saved(folder, seed=7)
    with pytest.raises(ModelError, match="has changed"):
        pipeline.answer(records, spec, store=store)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "rtn:3"),
        ("qwen2", "gptq:4"),
        ("gpt2", "awq:4"),
        ("opt", "smoothquant:8"),
        ("neox", "gptq:4"),
        ("qwen3", "awq:4"),
        ("gemma2", "rtn:4"),
        ("gemma3", "awq:4"),
        ("phi3", "smoothquant:8"),
        (tiny.GENERIC, "awq:4"),
    ],
)
def test_a_written_folder_measures_like_the_variant_it_came_from(
    home: Path, tmp_path: Path, family: str, method: str
) -> None:
    folder = tiny.saved(tmp_path / "model", family)
    spec = spec_for(folder, method)
    (record,) = pipeline.compare(spec, store=Store())
    out = tmp_path / "written" / "here"
    assert pipeline.quantize(spec, spec.variants[0], out) == out
    _, alone = pipeline.evaluate(dataclasses.replace(spec, model=str(out)))
    assert alone.perplexity == record.perplexity
    assert (alone.size_bytes, alone.bits) == (record.size_bytes, record.bits)
    assert alone.outputs[0].text == record.outputs[0].text
    assert alone.kl_divergence is None
    generic = [text for text in record.fallbacks if "generic path, no folds" in text]
    assert len(generic) == (family == tiny.GENERIC)


def test_a_written_gguf_measures_like_the_variant_it_came_from(
    home: Path, folder: Path, tmp_path: Path
) -> None:
    spec = spec_for(folder, "gguf:q8_0")
    (record,) = pipeline.compare(spec, store=Store())
    written = pipeline.quantize(spec, spec.variants[0], tmp_path / "out.gguf", "gguf")
    assert written == tmp_path / "out.gguf"
    _, alone = pipeline.evaluate(dataclasses.replace(spec, model=str(written)))
    assert alone.perplexity == record.perplexity
    assert alone.config == {"type": "q8_0", "imatrix": False, "engine": "llama.cpp"}
    assert alone.size_bytes == record.size_bytes
    inside = pipeline.quantize(spec, spec.variants[0], tmp_path / "folder", "gguf")
    assert inside == tmp_path / "folder" / "model.gguf"


def test_gguf_types_without_llama_cpp_run_in_torch_and_say_so(home: Path, tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "opt", "opt")
    (record,) = pipeline.compare(spec_for(folder, "gguf:q8_0"), store=Store())
    assert record.status == "finished"
    assert (record.kernel, record.execution) == ("QuantLab native", "packed")
    assert record.decode_tokens_per_second is not None
    assert any("no OPT architecture" in fallback for fallback in record.fallbacks)


def test_gguf_types_in_quantlabs_own_engine(home: Path, folder: Path) -> None:
    """The same codes, so the same size; llama.cpp rounds inputs to 8 bits."""
    spec = spec_for(folder, "gguf:q4_1,gguf:q4_1:engine=quantlab")
    theirs, ours = pipeline.compare(spec, store=Store())
    assert "llama.cpp" in str(theirs.kernel)
    assert "QuantLab native decoder" in str(ours.kernel)
    assert (ours.execution, ours.fallbacks) == ("packed", ())
    assert ours.bits_per_weight == pytest.approx(theirs.bits_per_weight, abs=0.1)
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=0.01)
    assert ours.kl_divergence > 0
    written = pipeline.quantize(spec, spec.variants[1], folder.parent / "own.gguf", "gguf")
    assert written.read_bytes()[:4] == b"GGUF", "asked for, it is written whatever runs the row"


def test_an_embedding_that_does_more_stays_as_it_is(home: Path, tmp_path: Path) -> None:
    """Gemma 3's multiplies its rows: packed, it would look them up and no more."""
    folder = tiny.saved(tmp_path / "gemma3", "gemma3", tied=True)
    (record,) = pipeline.compare(spec_for(folder, "gguf:q8_0:engine=quantlab"), store=Store())
    assert record.status == "finished"
    assert ["16 bits" in fallback for fallback in record.fallbacks] == [True]
    assert record.kl_divergence < 0.01


def test_quantize_refuses_what_cannot_be_written_and_touches_nothing(
    home: Path, folder: Path, tmp_path: Path
) -> None:
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "letter.txt").write_text("dear reader", encoding="utf-8")
    spec = spec_for(folder, "rtn:4")
    with pytest.raises(ConfigError, match="other files"):
        pipeline.quantize(spec, spec.variants[0], busy)
    with pytest.raises(ConfigError, match="--format quantlab"):
        pipeline.quantize(spec, spec.variants[0], tmp_path / "x", "gguf")
    with pytest.raises(ConfigError, match="does not quantize"):
        pipeline.quantize(spec, parse_variants("bf16")[0], tmp_path / "x")
    with pytest.raises(ConfigError, match="unknown 'exl2'"):
        pipeline.quantize(spec, spec.variants[0], tmp_path / "x", "exl2")
    assert (busy / "letter.txt").read_text(encoding="utf-8") == "dear reader"
    assert sorted(path.name for path in tmp_path.iterdir() if path != home) == ["busy", "model"]


def test_generate_streams_greedy_and_seeded_answers(home: Path, folder: Path) -> None:
    spec = spec_for(folder, "bf16", max_new_tokens=8)
    greedy = pipeline.generate(spec)
    assert greedy == pipeline.generate(spec, temperature=0.0)
    warm = [pipeline.generate(spec, temperature=1.5)[0].tokens for _ in range(2)]
    assert warm[0] == warm[1] != greedy[0].tokens
    other = dataclasses.replace(spec, seed=5)
    assert pipeline.generate(other, temperature=1.5)[0].tokens != warm[0]
    with pytest.raises(ConfigError):
        pipeline.generate(spec, temperature=-1.0)


def test_estimates_grow_with_the_work(home: Path) -> None:
    small = RunSpec(variants=parse_variants("bf16"))
    large = RunSpec(variants=parse_variants("bf16,gptq:4,awq:4"), eval_tokens=16384)
    assert 0 < pipeline.estimate(small).seconds < pipeline.estimate(large).seconds
    assert pipeline.estimate(RunSpec(model="no/such")).note


def test_estimates_count_the_passes_over_the_calibration_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In lockstep one pass, two with the original beside it; else collecting and going on."""
    monkeypatch.setattr(estimate, "matmul_rate", lambda dtype: 1e11)
    monkeypatch.setattr(estimate, "SECOND_MOMENT_COST", 0.0)

    def passes(label: str) -> float:
        def seconds(tokens: int) -> float:
            spec = RunSpec(variants=parse_variants(label), calibration_tokens=tokens)
            return pipeline.estimate(spec).seconds

        one = (
            2
            * estimate.parameter_count("bundled")
            * 4096
            / (1e11 * estimate.CALIBRATION_EFFICIENCY)
        )
        return (seconds(8192) - seconds(4096)) / one

    assert passes("gptq:4") == pytest.approx(1)
    assert passes("gptq:3") == pytest.approx(2)
    assert passes("awq:4") == pytest.approx(1)
    assert passes("nf4") == 0
    assert passes("gguf:q4_0:imatrix=true") == pytest.approx(1)


def test_estimates_know_that_training_takes_long(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In forward passes over the calibration tokens: some 20 at half speed, where GPTQ takes about
    two and the sums of its statistics."""
    monkeypatch.setattr(estimate, "matmul_rate", lambda dtype: 1e11)

    def seconds(labels: str) -> float:
        return pipeline.estimate(RunSpec(variants=parse_variants(labels))).seconds

    plain = seconds("gptq:2")
    assert seconds("efficientqat:2") - plain > 4 * (plain - seconds("rtn:2"))
    assert seconds("qat:2") > plain
    assert seconds("efficientqat:2:e2e_epochs=9") > seconds("efficientqat:2")
