"""Forks: forced tokens, chains of them, and what the page makes of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab import forks
from quantlab.answers import Answering, answer_prompts
from quantlab.engine import Session, encode_prompt
from quantlab.errors import JobError
from quantlab.interleave import answer_together
from quantlab.jobs import JobQueue
from quantlab.methods import parse_variants
from quantlab.runs import Run
from quantlab.store import Store
from quantlab.types import Choice, Generation, OutputDelta, RunSpec
from quantlab.ui import forks as explorer
from quantlab.ui import painter, services, views
from quantlab.ui.client import Client
from tests.records import failed, record
from tests.records import run as run_of
from tests.tiny import EOS, tiny, tokenizer

PROMPT = "The river carried timber"
HOSTILE = "<img src=x onerror=alert(1)><script>alert(1)</script>"
ENGLISH = Client()

# Forced tokens, on a real model


def by_hand(module: Any, ids: list[int], forced: Sequence[int], limit: int) -> list[int]:
    """Greedy decoding without a cache: the whole text is read anew for every token."""
    said: list[int] = []
    while len(said) < limit:
        with torch.no_grad():
            token = int(module(torch.tensor([ids + said]), use_cache=False).logits[0, -1].argmax())
        token = forced[len(said)] if len(said) < len(forced) else token
        if token == EOS:
            break
        said.append(token)
    return said


@pytest.mark.parametrize("forced", [(), (7,), (7, 300, 41)])
def test_an_answer_goes_on_behind_forced_tokens(forced: tuple[int, ...]) -> None:
    model = tiny()
    events: list[Any] = []
    answering = Answering(
        lambda choose: Session(model.module, choose),
        model.tokenizer,
        PROMPT,
        0,
        10,
        "rtn:4",
        events.append,
        forced,
    )
    *_, found = answering.steps()
    assert found is not None
    ids = encode_prompt(model.tokenizer, PROMPT)
    assert list(found.tokens) == by_hand(model.module, ids, forced, 10)
    assert found.tokens[: len(forced)] == forced
    text = "".join(event.text for event in events if isinstance(event, OutputDelta))
    assert text == found.text == model.tokenizer.decode(found.tokens)


def test_choices_are_what_the_model_preferred_also_where_it_was_forced() -> None:
    model = tiny()
    forced = (7, 300)
    (found,) = [
        one
        for one in Answering(
            lambda choose: Session(model.module, choose),
            model.tokenizer,
            PROMPT,
            0,
            6,
            "x",
            lambda event: None,
            forced,
        ).steps()
        if one is not None
    ]
    ids = encode_prompt(model.tokenizer, PROMPT)
    assert len(found.choices) == len(found.tokens) == 6
    for place, top in enumerate(found.choices):
        with torch.no_grad():
            read = torch.tensor([ids + list(found.tokens[:place])])
            chances = model.module(read, use_cache=False).logits[0, -1].double().softmax(-1)
        best, order = chances.topk(5)
        assert [token for token, _, _ in top] == order.tolist()
        # float32 logits of size 10 and six decimals kept
        assert [chance for _, chance, _ in top] == pytest.approx(best.tolist(), abs=1e-5)
        assert [text for _, _, text in top] == [
            tokenizer().decode([token]) or tokenizer().convert_ids_to_tokens(token)
            for token, _, _ in top
        ]
    assert found.choices[0][0][0] != 7
    back = Generation.from_json(found.to_json())
    assert back == found


def test_an_end_that_is_overruled_is_kept_as_a_choice() -> None:
    """The model wants to end at once; forced on, it says what is forced and ends after it."""

    class Tired:
        def prefill(self, ids: Sequence[int]) -> int:
            return self.step(0)

        def step(self, token: int) -> int:
            logits = torch.zeros(384)
            logits[EOS] = 5.0
            return self.choose(logits)

        def __init__(self, choose: Any) -> None:
            self.choose = choose

    (found,) = [
        one
        for one in Answering(
            Tired, tokenizer(), PROMPT, 0, 9, "x", lambda event: None, (40, 41)
        ).steps()
        if one is not None
    ]
    assert found.tokens == (40, 41)
    assert [top[0][0] for top in found.choices] == [EOS] * 3
    assert found.choices[2][0][2] == "</s>"


def test_sampled_answers_keep_no_choices_and_old_records_have_none() -> None:
    model = tiny()
    (found,) = answer_prompts(
        lambda _: Session(model.module), model.tokenizer, [PROMPT], 3, "x", lambda event: None
    )
    assert found.choices == ()
    old = found.to_json()
    del old["choices"]
    assert Generation.from_json(old) == found
    spec = RunSpec().to_json()
    del spec["forced"]
    assert RunSpec.from_json(spec) == RunSpec()
    forced = RunSpec(forced=(1, 2))
    assert RunSpec.from_json(forced.to_json()) == forced


def test_the_pipeline_forces_what_the_spec_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny()

    class Runner:
        def session(self, choose: Any) -> Session:
            return Session(model.module, choose)

        def close(self) -> None:
            pass

    monkeypatch.setattr("quantlab.interleave._open", lambda *_: Runner())
    monkeypatch.setattr("quantlab.interleave.load_tokenizer_of", lambda _: model.tokenizer)
    spec = RunSpec(
        variants=parse_variants("rtn:4"), prompts=(PROMPT,), max_new_tokens=8, forced=(9, 10)
    )
    (answered,) = answer_together(
        [record("rtn:4")], spec, model.source, Store(tmp_path), lambda event: None
    )
    ids = encode_prompt(model.tokenizer, PROMPT)
    assert list(answered.outputs[0].tokens) == by_hand(model.module, ids, (9, 10), 8)


# Chains


def said(*tokens: int, choices: tuple[tuple[Choice, ...], ...] = ()) -> Generation:
    pieces = tuple(f" w{token}" for token in tokens)
    return Generation("Why?", "".join(pieces), tokens, pieces, choices=choices)


def attempt(forced: tuple[int, ...], answer: Generation | None, limit: int = 48) -> Run:
    """A run that forced these tokens; without an answer it failed."""
    given = failed("rtn:4") if answer is None else record("rtn:4", outputs=(answer,))
    spec = RunSpec(
        variants=parse_variants("rtn:4"), prompts=("Why?",), max_new_tokens=limit, forced=forced
    )
    return run_of(given, id=f"r{forced}", kind="answer", spec=spec, parent="c")


def test_a_chain_by_hand() -> None:
    original, own = said(1, 2, 3, 4, 5, 6), said(1, 9, 9)
    first = attempt((1, 2), said(1, 2, 3, 8, 8))
    second = attempt((1, 2, 3, 4), said(1, 2, 3, 4, 5, 6))
    elsewhere = [attempt((1, 2), said(1, 2, 7), limit=9), attempt((1,), said(1, 7))]
    alone = forks.chain(original, own, elsewhere, 48)
    assert (len(alone.links), alone.next_forced()) == (1, (1, 2))
    half = forks.chain(original, own, [first], 48)
    assert [(link.forced, link.agreed, link.at) for link in half.links] == [(0, 1, 1), (2, 1, 3)]
    assert half.next_forced() == (1, 2, 3, 4)
    whole = forks.chain(original, own, [*elsewhere, second, first], 48)
    assert [(link.forced, link.agreed, link.at) for link in whole.links] == [
        (0, 1, 1),
        (2, 1, 3),
        (4, 2, None),
    ]
    assert whole.next_forced() is None


def test_a_failed_attempt_is_pending_and_takes_nothing_away() -> None:
    original, own = said(1, 2, 3), said(9)
    broken = attempt((1,), None)
    waiting = forks.chain(original, own, [broken], 48)
    assert waiting.pending is broken
    assert waiting.next_forced() == (1,)
    mended = forks.chain(original, own, [broken, attempt((1,), said(1, 2, 3))], 48)
    assert [link.at for link in mended.links] == [0, None]
    assert mended.pending is None


def test_where_one_of_the_two_has_ended() -> None:
    longer = forks.chain(said(1, 2), said(1, 2, 3), [], 48)
    assert (longer.links[0].at, longer.next_forced()) == (2, None)
    shorter = forks.chain(said(1, 2), said(1), [], 48)
    assert (shorter.links[0].at, shorter.next_forced()) == (1, (1, 2))


@pytest.mark.parametrize("seed", range(5))
def test_a_chain_forces_exactly_where_the_variant_would_have_chosen_otherwise(seed: int) -> None:
    """Against teacher forcing: the variant reads the original's answer, token by token."""
    limit = 30

    def preferred(who: int, context: tuple[int, ...]) -> int:
        draw = random.Random(f"{seed} {context}")
        common = draw.randrange(50)
        return draw.randrange(50) if who and draw.random() < 0.3 else common

    def answer(who: int, forced: tuple[int, ...]) -> Generation:
        tokens = forced
        while len(tokens) < limit:
            tokens = (*tokens, preferred(who, tokens))
        return said(*tokens)

    original = answer(0, ())
    wanted = [
        place
        for place in range(limit)
        if preferred(1, original.tokens[:place]) != original.tokens[place]
    ]
    runs: list[Run] = []
    chain = forks.chain(original, answer(1, ()), runs, limit)
    while (forced := chain.next_forced()) is not None:
        runs.insert(0, attempt(forced, answer(1, forced), limit))
        chain = forks.chain(original, answer(1, ()), runs, limit)
    assert [link.at for link in chain.links] == [*wanted, None]
    assert sum(link.agreed for link in chain.links) + len(wanted) == limit


# The page


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[services.Services]:
    """Services on a store of their own; the queue is not started."""
    store = Store(tmp_path / "home")
    made = services.Services(store, JobQueue(store, title=services.title))
    monkeypatch.setattr(services, "_services", made)
    monkeypatch.setattr(painter, "environment", lambda: {"cpu": "a chip", "threads": 2})
    yield made
    store.close()


def compared(at: services.Services, original: Generation, own: Generation) -> str:
    spec = RunSpec(variants=parse_variants("bf16,rtn:4"), prompts=(original.prompt,))
    run_id = at.store.create_run(spec)
    at.store.add_record(run_id, record("bf16", outputs=(original,)))
    at.store.add_record(run_id, record("rtn:4", outputs=(own,)))
    at.store.update_run(run_id, status="finished")
    return run_id


def shown(at: services.Services, run_id: str, fork: str = "") -> str:
    html: str = painter.paint(ENGLISH, run_id, {}, fork).changed["forks"]
    return html


def test_forcing_is_a_job_and_its_answer_the_next_link(at: services.Services) -> None:
    tie: tuple[Choice, ...] = ((2, 0.41, " w2"), (9, 0.40, " w9"))
    other: tuple[Choice, ...] = ((9, 0.45, " w9"), (2, 0.44, " w2"))
    sure: tuple[Choice, ...] = ((4, 0.93, " w4"), (8, 0.02, " w8"))
    original = said(1, 2, 3, 4, choices=(tie, tie, tie, sure))
    run_id = compared(at, original, said(1, 9, 9, choices=(tie, other, tie)))
    page = shown(at, run_id)
    assert "Tokens shared with the original: 1." in page
    assert "near-tie flip" in page
    assert "41.0%" in page
    assert "45.0%" in page
    assert f'data-act="force:{run_id}:0:1:rtn:4"' in page
    explorer._force(at, run_id, f"{run_id}:0:1:rtn:4")
    (job,) = at.queue.waiting()
    spec = at.store.run(job).spec
    assert (spec.forced, spec.prompts) == ((1, 2), ("Why?",))
    assert [variant.label for variant in spec.variants] == ["rtn:4"]
    page = shown(at, run_id)
    assert f'data-act="stop:{job}"' in page
    assert 'data-act="force' not in page
    # It is neither an answer of its own nor a line of the history.
    assert at.answers_to(run_id) == []
    assert job not in views.runs(ENGLISH, at.history(), run_id)
    at.store.add_record(
        job, record("rtn:4", outputs=(said(1, 2, 3, 8, choices=(tie, other, tie, other)),))
    )
    at.store.update_run(job, status="finished")
    at.history(fresh=True)
    page = shown(at, run_id)
    assert "“␣w2” forced; further tokens shared: 1." in page
    assert "confident flip" in page
    assert f'data-act="force:{run_id}:0:3:rtn:4"' in page
    assert "the same for 3 of the original&#39;s 4 tokens, 1 of them forced" in page


def test_a_cancelled_force_can_be_tried_again(at: services.Services) -> None:
    run_id = compared(at, said(1, 2), said(9))
    explorer._force(at, run_id, f"{run_id}:0:0:rtn:4")
    (job,) = at.queue.waiting()
    at.queue.cancel(job)
    at.history(fresh=True)
    page = shown(at, run_id)
    assert "Cancelled" in page
    assert f"force:{run_id}:0:0:rtn:4" in page
    explorer._force(at, run_id, f"{run_id}:0:0:rtn:4")
    assert len(at.queue.waiting()) == 1


def test_what_is_not_there_cannot_be_forced(at: services.Services) -> None:
    run_id = compared(at, said(1, 2), said(9))
    for what in (f"{run_id}:0:0:gptq:4", f"{run_id}:5:0:rtn:4", "nothing:0:0:rtn:4"):
        with pytest.raises(JobError):
            explorer._force(at, run_id, what)
    assert at.queue.waiting() == []


def test_the_chosen_prompt_is_shown_and_nothing_runs(at: services.Services) -> None:
    hostile = dataclasses.replace(
        said(1, 2, choices=(((1, 0.9, HOSTILE),), ((2, 0.9, HOSTILE),))),
        prompt=HOSTILE,
        pieces=(HOSTILE, HOSTILE),
    )
    own = dataclasses.replace(
        said(1, 9, 9, choices=(((1, 0.9, HOSTILE),), ((9, 0.9, HOSTILE),))),
        prompt=HOSTILE,
        pieces=(HOSTILE,) * 3,
    )
    run_id = compared(at, hostile, own)
    later = at.store.create_run(
        RunSpec(variants=parse_variants("bf16,rtn:4"), prompts=("Later?",)), "answer", run_id
    )
    for name in ("bf16", "rtn:4"):
        answer = dataclasses.replace(said(3), prompt="Later?")
        at.store.add_record(later, record(name, outputs=(answer,)))
    at.store.update_run(later, status="finished")
    at.history(fresh=True)
    newest = shown(at, run_id)
    assert '<blockquote class="ql-prompt">Later?</blockquote>' in newest
    assert "the whole answer is the original&#39;s (tokens: 1)" in newest
    older = shown(at, run_id, f"{run_id}:0")
    assert "&lt;img" in older
    for page in (newest, older):
        assert "<img" not in page
        assert "<script" not in page
    assert "part stands here" in explorer.page(ENGLISH, None, at, "")
