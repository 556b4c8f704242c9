"""Quality of toy scorers by hand, of tiny models against transformers, and the kept reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from quantlab.errors import ModelError
from quantlab.metrics.intervals import SEGMENT_TOKENS, interval
from quantlab.metrics.quality import TorchScorer, measure_quality, reference_states
from quantlab.metrics.reading import Closeup, most_likely
from quantlab.models import LoadedModel, ModelSource
from quantlab.models.loading import family_of, prepare_module
from quantlab.types import Event, Progress, ignore
from tests.tiny import BOS, CONTEXT, FAMILIES, VOCABULARY, random, tiny, token_ids

pytestmark = pytest.mark.usefixtures("home")


class Table:
    """Next-token logits from a table of bigrams, in chunks of any size."""

    def __init__(self, table: Tensor, chunk: int) -> None:
        self.table, self.chunk = table, chunk

    def chunks(self, window: Tensor) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, window.numel(), self.chunk):
            yield start, self.table[window[start : start + self.chunk]]


def by_hand(table: Tensor, windows: list[Tensor]) -> float:
    """exp of the mean of -log p(next | this) over all pairs of neighbours, float64."""
    log_p = table.double().log_softmax(-1)
    pairs = [(a, b) for window in windows for a, b in itertools.pairwise(window)]
    return math.exp(-sum(float(log_p[a, b]) for a, b in pairs) / len(pairs))


@pytest.mark.parametrize("chunk", [128, 50, 7, 1000])
def test_perplexity_by_hand(chunk: int) -> None:
    """Every token but a window's first counts once and alike, in whatever chunks they come."""
    table = 2 * random(20, 20)
    windows = list(torch.randint(0, 20, (3, 200), generator=torch.Generator().manual_seed(1)))
    found = measure_quality(Table(table, chunk), windows, None, "toy", ignore)
    assert found.perplexity == pytest.approx(by_hand(table, windows), rel=1e-5)
    assert found.perplexity_ci is not None
    assert found.perplexity_ci[0] < found.perplexity < found.perplexity_ci[1]
    assert (found.kl_divergence, found.kl_divergence_ci, found.top1_agreement) == (None,) * 3
    assert set(found.segments) == {"nll", "kl"}
    assert found.segments["kl"] == []


def test_a_uniform_scorer_is_as_perplexed_as_its_vocabulary() -> None:
    found = measure_quality(Table(torch.zeros(50, 50), 128), [torch.arange(50)], None, "", ignore)
    assert found.perplexity == pytest.approx(50)


@pytest.mark.parametrize("chunk", [128, 50, 7, 1000])
def test_segments_are_128_predicted_tokens(chunk: int) -> None:
    """Of the same tokens in whatever chunks an engine works, so that rows can be paired."""
    table, windows = random(20, 20), [torch.arange(300) % 20, torch.arange(300) * 7 % 20]
    found = measure_quality(Table(table, chunk), windows, None, "", ignore)
    log_p = table.log_softmax(-1)
    wanted = []
    for window in windows:
        for start, stop in ((0, 128), (128, 256), (256, 299)):
            pairs = zip(window[start:stop], window[start + 1 : stop + 1], strict=True)
            wanted.append(-sum(float(log_p[a, b]) for a, b in pairs) / (stop - start))
    assert found.segments["nll"] == pytest.approx(wanted, rel=1e-5)


def test_a_last_chunk_without_a_next_token_is_left_out() -> None:
    """257 tokens: 256 are predicted, in two segments; the last token predicts nothing."""
    found = measure_quality(
        Table(random(20, 20), SEGMENT_TOKENS), [torch.arange(257) % 20], None, "", ignore
    )
    assert len(found.segments["nll"]) == 2


# --- real models -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_perplexity_is_that_of_transformers(name: str) -> None:
    """exp of the loss that the model's own forward computes."""
    model, window = tiny(name, seed=1), token_ids(1, 100)[0]
    found = measure_quality(TorchScorer(model.module, None), [window], None, "", ignore)
    with torch.no_grad():
        loss = model.module(window[None], labels=window[None]).loss
    assert found.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)


def test_windows_begin_with_bos_where_the_tokenizer_says_so() -> None:
    """The token in front is read and neither predicted nor counted."""
    model, windows = tiny(seed=1), list(token_ids(2, 40))
    found = measure_quality(TorchScorer(model.module, BOS), windows, None, "", ignore)
    total = 0.0
    for window in windows:
        ids = torch.cat([torch.tensor([BOS]), window])
        with torch.no_grad():
            log_p = model.module(ids[None]).logits[0].double().log_softmax(-1)
        # Position 1 holds the window's first token and predicts its second.
        total -= sum(float(log_p[i, ids[i + 1]]) for i in range(1, 40))
    assert found.perplexity == pytest.approx(math.exp(total / (2 * 39)), rel=1e-5)
    without = measure_quality(TorchScorer(model.module, None), windows, None, "", ignore)
    assert without.perplexity != pytest.approx(found.perplexity, rel=1e-4)


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_original_agrees_with_itself(name: str, bos: int | None) -> None:
    model, windows = tiny(name), list(token_ids(2, 110))
    reference = reference_states(model, windows, bos, ignore)
    found = measure_quality(TorchScorer(model.module, bos), windows, reference, "", ignore)
    assert found.kl_divergence == pytest.approx(0, abs=1e-9)
    assert found.top1_agreement == 1
    assert found.kl_divergence_ci is not None
    assert max(found.kl_divergence_ci) < 1e-9


def test_divergence_and_agreement_against_a_loop() -> None:
    original, variant = tiny(seed=1), tiny(seed=1)
    variant.module.model.layers[0].mlp.down_proj.weight.mul_(1.3)
    windows = list(token_ids(3, 60))
    reference = reference_states(original, windows, None, ignore)
    found = measure_quality(TorchScorer(variant.module, None), windows, reference, "", ignore)
    divergences, agreed = [], 0
    for window in windows:
        with torch.no_grad():
            log_p, log_q = (
                model.module(window[None]).logits[0, :-1].double().log_softmax(-1)
                for model in (original, variant)
            )
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    means = [float(values.mean()) for values in divergences]
    assert found.kl_divergence == pytest.approx(sum(means) / 3, rel=1e-3)
    assert found.kl_divergence > 0.001
    assert found.segments["kl"] == pytest.approx(means, rel=1e-3)
    assert found.kl_divergence_ci == pytest.approx(interval(means), rel=1e-3)
    assert found.top1_agreement == agreed / (3 * 59)
    assert 0 < found.top1_agreement < 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_model_has_no_numbers(bad: float) -> None:
    original, broken = tiny(), tiny()
    broken.module.model.norm.weight[3] = bad
    windows = list(token_ids(2, 40))
    reference = reference_states(original, windows, None, ignore)
    for given in (None, reference):
        found = measure_quality(TorchScorer(broken.module, None), windows, given, "", ignore)
        assert found.perplexity is None
        assert found.perplexity_ci is None
        assert found.kl_divergence is None
        assert found.kl_divergence_ci is None
        assert found.top1_agreement is None
        assert found.segments == {}


def test_progress_names_the_variant() -> None:
    events: list[Event] = []
    model, windows = tiny(), list(token_ids(3, 20))
    reference = reference_states(model, windows, None, events.append)
    measure_quality(TorchScorer(model.module, None), windows, reference, "rtn:4", events.append)
    steps = [(e.variant, e.stage, e.done, e.total) for e in events if isinstance(e, Progress)]
    assert steps == [("original", "reference", i, 3) for i in range(3)] + [
        ("rtn:4", "perplexity", i, 3) for i in range(3)
    ]


# --- the reference -----------------------------------------------------------------------------


def test_the_reference_is_kept_and_read_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny(), list(token_ids(2, 40))
    first = reference_states(model, windows, None, ignore)
    assert len(list((home / "references").iterdir())) == 1

    def fail(self: object, window: Tensor) -> Tensor:
        raise AssertionError("measured again")

    monkeypatch.setattr(TorchScorer, "hidden", fail)
    again = reference_states(tiny(), windows, None, ignore)
    assert torch.equal(again.hidden, first.hidden)
    assert torch.equal(again.logits(1, 3, 9), first.logits(1, 3, 9))
    assert first.logits(1, 3, 9).shape == (6, VOCABULARY)
    for others in (
        (tiny(seed=1), windows, None),
        (model, windows, BOS),
        (model, list(token_ids(2, 40, seed=1)), None),
        (model, windows[:1], None),
        (model, list(token_ids(2, 40).reshape(4, 20)), None),  # the same tokens, cut otherwise
    ):
        with pytest.raises(AssertionError, match="measured again"):
            reference_states(*others, ignore)


def test_the_same_tokens_in_other_windows_are_another_reference() -> None:
    model, ids = tiny(), token_ids(2, 40)
    long = reference_states(model, list(ids), None, ignore)
    short = reference_states(model, list(ids.reshape(4, 20)), None, ignore)
    assert (long.hidden.shape, short.hidden.shape) == ((2, 40, 64), (4, 20, 64))


def other_head(kind: str) -> LoadedModel:
    """Models whose logits are scaled or capped after the head."""
    shared: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    module: nn.Module = {
        "capped": lambda: Gemma2ForCausalLM(
            Gemma2Config(**shared, head_dim=16, final_logit_softcapping=0.05)
        ),
        "scaled": lambda: CohereForCausalLM(CohereConfig(**shared, logit_scale=0.2)),
        "divided": lambda: GraniteForCausalLM(GraniteConfig(**shared, logits_scaling=8.0)),
    }[kind]()
    module = prepare_module(module)
    source = ModelSource(kind, "folder", None, f"head:{kind}")
    return LoadedModel(source, module, None, family_of(module))


@pytest.mark.parametrize("kind", ["capped", "scaled"])
def test_heads_with_caps_and_scales(kind: str) -> None:
    model, window = other_head(kind), token_ids(1, 30)[0] % 64
    reference = reference_states(model, [window], None, ignore)
    with torch.no_grad():
        wanted = model.module(window[None]).logits[0]
        bare = model.module.get_output_embeddings()(reference.hidden[0])
    torch.testing.assert_close(reference.logits(0, 0, 30), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(bare, wanted, rtol=1e-2, atol=1e-4), "the cap or scale must matter"


def test_other_heads_are_refused_and_nothing_is_kept(home: Path) -> None:
    model, window = other_head("divided"), token_ids(1, 30)[0] % 64
    model.module.get_output_embeddings().weight.mul_(50)
    with pytest.raises(ModelError, match="granite: its head does more than a linear layer"):
        reference_states(model, [window], None, ignore)
    assert not list(home.glob("references/*"))


@pytest.mark.parametrize("chunk", [128, 50, 1000])
def test_the_reading_is_the_metric_token_by_token(home: Path, chunk: int) -> None:
    """Its KL values are those whose mean is the first segment's, and those of float64 softmaxes."""
    model, other = tiny(seed=1), tiny(seed=2)
    windows = list(token_ids(2, CONTEXT - 1, seed=4))
    reference = reference_states(model, windows, BOS, ignore)

    class Chunked(TorchScorer):
        def chunks(self, window: Tensor) -> Iterator[tuple[int, Tensor]]:
            whole = self.head(self.hidden(window))
            for start in range(0, window.numel(), chunk):
                yield start, whole[start : start + chunk]

    found = measure_quality(Chunked(other.module, BOS), windows, reference, "", ignore)
    reading, count = found.reading, windows[0].numel() - 1
    assert reading["tokens"] == windows[0].tolist()
    assert len(reading["kl"]) == count
    assert sum(reading["kl"]) / count == pytest.approx(found.segments["kl"][0], rel=1e-12)
    ids = torch.cat([torch.tensor([BOS]), windows[0]])[None]
    log_p, log_q = (
        one.module(ids, use_cache=False).logits[0, 1:-1].detach().double().log_softmax(-1)
        for one in (model, other)
    )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert reading["kl"] == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-5)
    for name, log in (("original", log_p), ("variant", log_q)):
        for top, row in zip(reading[name], log, strict=True):
            order = sorted(range(VOCABULARY), key=lambda token, row=row: -float(row[token]))[:5]
            assert [token for token, _ in top] == order
            assert [p for _, p in top] == pytest.approx(row[order].exp().tolist(), abs=1e-5)


def test_a_reading_ends_with_the_first_segment() -> None:
    logits = random(300, 20)
    closeup = Closeup(7)
    for part in (slice(0, 100), slice(100, 250), slice(250, 300)):
        kl = torch.arange(300).double()[part]
        closeup.add(logits[part], logits[part], kl, torch.arange(300)[part])
    assert closeup.to_json()["tokens"] == [7, *range(SEGMENT_TOKENS)]
    assert closeup.kl == list(range(SEGMENT_TOKENS))
    assert len(closeup.original) == len(closeup.variant) == SEGMENT_TOKENS


def test_the_most_likely_tokens_by_hand() -> None:
    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
    (top,) = most_likely(logits[:, :3])
    assert [token for token, _ in top] == [1, 0, 2]
    assert [p for _, p in top] == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=1e-6)
