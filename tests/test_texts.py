"""Texts: cutting, refusals, sampling from the model, and the two texts of the project."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationMixin

from quantlab.errors import ConfigError, TextError
from quantlab.models import LoadedModel
from quantlab.texts import (
    ASSETS,
    NAMED,
    TokenText,
    calibration_ids,
    check_text,
    read_text,
    sample_from_model,
    tokenize,
)
from quantlab.types import Event, Progress, ignore
from tests.tiny import BOS, CONTEXT, VOCABULARY, tiny, tokenizer

pytestmark = pytest.mark.usefixtures("home", "exact")

# --- cutting -----------------------------------------------------------------------------------


def numbered(tokens: int) -> TokenText:
    return TokenText("counting", "0" * 64, torch.arange(tokens))


@settings(deadline=None)
@given(size=st.integers(1, 400), tokens=st.integers(1, 500), length=st.integers(1, 60))
def test_windows_are_the_start_of_the_text_without_gaps(
    size: int, tokens: int, length: int
) -> None:
    text = numbered(size)
    count = min(tokens, size) // length
    if not count:
        with pytest.raises(TextError, match="one window takes"):
            text.windows(tokens, length)
        return
    windows = text.windows(tokens, length)
    assert [window.numel() for window in windows] == [length] * count
    assert torch.cat(windows).tolist() == list(range(count * length))


@settings(deadline=None)
@given(size=st.integers(1, 400), tokens=st.integers(1, 500), length=st.integers(1, 60))
def test_pieces_are_spread_over_the_whole_text(size: int, tokens: int, length: int) -> None:
    text = numbered(size)
    if size < length:
        with pytest.raises(TextError, match="one piece takes"):
            text.spread(tokens, length)
        return
    pieces = text.spread(tokens, length)
    count = min(max(tokens // length, 1), size // length)
    assert pieces.shape == (count, length)
    starts = pieces[:, 0].tolist()
    for piece, start in zip(pieces.tolist(), starts, strict=True):
        assert piece == list(range(start, start + length))
    gaps = [after - before - length for before, after in itertools.pairwise(starts)]
    assert all(gap >= 0 for gap in gaps), "pieces overlap"
    assert starts[0] == 0
    if count > 1:
        assert pieces[-1, -1] == size - 1
        assert max(gaps) - min(gaps) <= 1, "unevenly spread"


def test_short_texts_say_what_would_be_right() -> None:
    with pytest.raises(TextError, match="counting: 5 tokens, but one window takes 8") as caught:
        numbered(5).windows(100, 8)
    assert "longer text or a smaller window" in str(caught.value)
    with pytest.raises(TextError, match="counting: 5 tokens, but one piece takes 8") as caught:
        numbered(5).spread(100, 8)
    assert "--calibration-length" in str(caught.value)


# --- reading -----------------------------------------------------------------------------------


def test_files_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("Grüße, 世界\nsecond line".encode())
    assert read_text(str(path), "evaluation") == "Grüße, 世界\nsecond line"
    assert read_text("project", "evaluation") == (ASSETS / "evaluation.txt").read_text("utf-8")
    assert read_text("project", "calibration") == (ASSETS / "calibration.txt").read_text("utf-8")


@pytest.mark.parametrize("role", ["evaluation", "calibration"])
@pytest.mark.parametrize("name", ["missing.txt", "", ".", "~nobody-here/x", "nul\0", "long " * 999])
def test_missing_files_are_refused_with_the_choices(name: str, role: Any) -> None:
    with pytest.raises(TextError, match=f"{role} text: no such file") as caught:
        read_text(name, role)
    message = str(caught.value)
    assert len(message) < 300
    assert "project" in message
    assert "wikitext2" in message
    assert ("self" in message) == (role == "calibration")


@pytest.mark.parametrize("data", [b"\x80\x81\x82" * 9, b"\xff\xfe\0a\0b", b"good start \xc3"])
def test_binary_files_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with pytest.raises(TextError, match=r"picture\.png is not readable UTF-8 text"):
        read_text(str(path), "calibration")


def test_a_model_cannot_be_evaluated_on_itself() -> None:
    with pytest.raises(TextError, match="'self' is for calibration"):
        read_text("self", "evaluation")
    with pytest.raises(TextError, match="'self' is for calibration"):
        check_text("self", "evaluation", 8)
    check_text("self", "calibration", 10**9)


def test_the_cheap_check_catches_what_cannot_be_enough(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("twelve bytes")
    check_text(str(path), "evaluation", 12)
    with pytest.raises(TextError, match="12 bytes, too few for 13 tokens"):
        check_text(str(path), "evaluation", 13)
    with pytest.raises(TextError, match="no such file"):
        check_text(str(tmp_path / "none"), "evaluation", 1)


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_data_sets_out_of_reach_say_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    check_text(name, "evaluation", 8)
    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(TextError, match=f"text {name}: .*needs a network, use project"):
        read_text(name, "evaluation")


@pytest.mark.parametrize(("role", "split"), [("evaluation", "test"), ("calibration", "train")])
def test_calibration_and_evaluation_read_different_splits(
    role: Any, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *a, split: {"text": [split, " text"]})
    assert read_text("wikitext2", role) == f"{split} text"


# --- tokens ------------------------------------------------------------------------------------


def test_tokenizing_adds_no_special_tokens(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The river carried timber. " * 20)
    text = tokenize(tokenizer(), str(path), "evaluation")
    assert text.ids.dtype == torch.int64
    assert tokenizer().decode(text.ids) == path.read_text()
    assert text.bos is None, "this tokenizer puts nothing in front by itself"
    again = tokenize(tokenizer(), str(path), "evaluation")
    assert again.sha256 == text.sha256
    path.write_text("The river carried timber, ")
    assert tokenize(tokenizer(), str(path), "evaluation").sha256 != text.sha256


def test_a_tokenizer_that_begins_with_bos_is_noticed(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = type(tokenizer().backend_tokenizer).from_str(tokenizer().backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    starting = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    path = tmp_path / "text.txt"
    path.write_text("The river carried timber.")
    text = tokenize(starting, str(path), "evaluation")
    assert text.bos == BOS
    assert BOS not in text.ids


def test_calibration_from_a_text(tmp_path: Path) -> None:
    model = tiny()
    ids, sha = calibration_ids(model, "project", 96, 32, 0, ignore)
    whole = tokenize(model.tokenizer, "project", "calibration")
    assert torch.equal(ids, whole.spread(96, 32))
    assert sha == whole.sha256


@pytest.mark.parametrize("name", ["project", "self"])
def test_pieces_must_fit_into_the_context(name: str) -> None:
    with pytest.raises(ConfigError, match=r"calibration_length: 129 is more than .* 128"):
        calibration_ids(tiny("gpt2"), name, 256, CONTEXT + 1, 0, ignore)
    calibration_ids(tiny("gpt2"), name, CONTEXT, CONTEXT, 0, ignore)


# --- sampling ----------------------------------------------------------------------------------


def test_sampling_is_seeded_and_leaves_the_random_state() -> None:
    model = tiny()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = sample_from_model(model, 3, 24, 0, ignore)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (3, 24)
    assert first.dtype == torch.int64
    assert bool((first[:, 0] == BOS).all())
    assert int(first.max()) < VOCABULARY
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(sample_from_model(model, 3, 24, 1, ignore), first)
    other = tiny(seed=1)
    assert not torch.equal(sample_from_model(other, 3, 24, 0, ignore), first)


def test_samples_are_kept(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    model = tiny()
    first = sample_from_model(model, 2, 16, 0, ignore)
    files = list((home / "texts").iterdir())
    assert [file.suffix for file in files] == [".safetensors"]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(GenerationMixin, "generate", fail)
    assert torch.equal(sample_from_model(tiny(), 2, 16, 0, ignore), first)
    for count, length, seed in ((3, 16, 0), (2, 17, 0), (2, 16, 1)):
        with pytest.raises(AssertionError, match="sampled again"):
            sample_from_model(model, count, length, seed, ignore)


def test_the_same_samples_come_from_a_fresh_cache(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sample_from_model(tiny(), 2, 16, 3, ignore)
    monkeypatch.setenv("QUANTLAB_HOME", str(home.parent / "other"))
    torch.manual_seed(99)
    assert torch.equal(sample_from_model(tiny(), 2, 16, 3, ignore), first)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "neox", "falcon"])
def test_samples_follow_the_model_at_temperature_one(name: str) -> None:
    """Sampled tokens are as likely as the model says: their mean log-probability is the mean of
    -entropy over the same positions, within four standard errors."""
    model = tiny(name)
    # Generation settings of the checkpoint must not matter.
    model.module.generation_config.temperature = 0.1
    model.module.generation_config.top_k = 3
    ids = sample_from_model(model, 16, 40, 0, ignore)
    with torch.no_grad():
        log_p = model.module(ids).logits.double().log_softmax(-1)[:, :-1]
    chosen = log_p.gather(2, ids[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    difference = (chosen + entropy).flatten()
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / difference.numel() ** 0.5
    assert ids.shape == (16, 40)


def test_sampling_tells_how_far_it_is_and_its_hash() -> None:
    events: list[Event] = []
    model = tiny()
    ids, sha = calibration_ids(model, "self", 64, 32, 0, events.append)
    assert ids.shape == (2, 32)
    steps = [event.done for event in events if isinstance(event, Progress)]
    assert steps == list(range(1, 32))
    other, different = calibration_ids(model, "self", 64, 32, 1, ignore)
    assert not torch.equal(ids, other)
    assert sha != different


def test_sampling_begins_somewhere_without_a_begin_token() -> None:
    model = tiny()
    bare = type(model.tokenizer)(tokenizer_object=model.tokenizer.backend_tokenizer)
    assert bare.bos_token_id is None
    loaded = LoadedModel(model.source, model.module, bare, model.family)
    assert sample_from_model(loaded, 1, CONTEXT // 4, 0, ignore)[0, 0] == 0


# --- the project's own texts -------------------------------------------------------------------


def project(role: Any) -> str:
    return read_text("project", role)


def sentences(text: str) -> list[tuple[str, ...]]:
    """Sentences of eight words and more, as lower-case words without punctuation."""
    split = re.split(r"(?<=[.!?])[\"'\u201d\u2019)]*\s+|\n{2,}", text)
    words = [tuple(re.findall(r"[\w'\u2019]+", sentence.lower())) for sentence in split]
    return [sentence for sentence in words if len(sentence) >= 8]


@pytest.mark.parametrize("role", ["evaluation", "calibration"])
def test_the_texts_are_long_varied_prose(role: str) -> None:
    text = project(role)
    assert len(text.encode()) >= 60_000
    found = sentences(text)
    assert len(found) > 300
    assert not [sentence for sentence, count in Counter(found).items() if count > 1]
    words = re.findall(r"[a-z']+", text.lower())
    assert len(set(words)) > 2_000
    assert "\t" not in text
    assert "\r" not in text
    assert "\N{REPLACEMENT CHARACTER}" not in text


def test_the_texts_share_no_sentence() -> None:
    first, second = (set(sentences(project(role))) for role in ("evaluation", "calibration"))
    assert not first & second


def test_the_texts_share_no_long_phrase() -> None:
    """Not twelve words in a row either, in whatever sentence they stand."""

    def phrases(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[\w'\u2019]+", text.lower())
        return {tuple(words[i : i + 12]) for i in range(len(words) - 11)}

    assert not phrases(project("evaluation")) & phrases(project("calibration"))


def test_the_default_run_fits_into_the_texts() -> None:
    """Tokens of a byte-level vocabulary of 384 are short; a real one makes about 4.3 bytes each."""
    from quantlab.types import RunSpec

    spec = RunSpec()
    assert len(project("calibration").encode()) > 4.6 * spec.calibration_tokens
    assert len(project("evaluation").encode()) > 4.6 * spec.eval_tokens


def test_every_named_text_can_be_read_or_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: {"text": ["x"]})
    assert set(NAMED) == {"project", "self", "wikitext2", "c4"}
    assert read_text("wikitext2", "evaluation") == "x"
