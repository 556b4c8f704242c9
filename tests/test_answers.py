"""Answers: what is streamed is what is kept, they end where they should, and where they part."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantlab.answers import Answering, answer_prompts, first_difference, mark_divergence, spelled
from quantlab.engine import Choose, Session, encode_prompt, generate
from quantlab.models import LoadedModel
from quantlab.results import ResultRecord
from quantlab.types import Event, Generation, OutputDelta, Progress
from tests.test_engine import byte_fallback
from tests.test_stops import oracle
from tests.tiny import CONTEXT, EOS, FEW, VOCABULARY, tiny, tokenizer


class Script:
    """A decoder that says given tokens whatever it reads, and writes down what it reads."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.read: list[int] = []
        self.prompt_length = len(tokenizer()("Why?").input_ids)

    def prefill(self, ids: Sequence[int]) -> int:
        self.read = list(ids)
        return self.tokens[0]

    def step(self, token: int) -> int:
        assert token == self.tokens[len(self.read) - self.prompt_length]
        self.read.append(token)
        return self.tokens[len(self.read) - self.prompt_length]


def spoken(text: str) -> list[int]:
    return list(tokenizer()(text).input_ids)


def answer(
    tokens: Sequence[int], limit: int = 100, stop_strings: Sequence[str] = ()
) -> tuple[Generation, list[Event], Script]:
    events: list[Event] = []
    script = Script(tokens)
    (found,) = answer_prompts(
        lambda choose: script, tokenizer(), ["Why?"], limit, "rtn:4", events.append, stop_strings
    )
    return found, events, script


def streamed(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, OutputDelta))


def test_an_answer_ends_at_the_end_token() -> None:
    said = spoken("Because rivers carry it.")
    found, events, script = answer([*said, EOS, 99])
    assert found.text == "Because rivers carry it."
    assert found.tokens == tuple(said)
    assert "".join(found.pieces) == found.text
    assert len(found.pieces) == len(found.tokens)
    assert found.prompt == "Why?"
    assert found.first_divergence is None
    assert streamed(events) == found.text
    # The prompt is read, then every token but the last.
    assert script.read == spoken("Why?") + said


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_an_answer_ends_at_its_limit(limit: int) -> None:
    said = spoken("Because rivers carry it to the sea.")
    found, events, script = answer(said, limit)
    assert found.tokens == tuple(said[:limit])
    assert found.text == tokenizer().decode(said[:limit])
    assert streamed(events) == found.text
    assert len(script.read) == len(spoken("Why?")) + limit - 1, "no token is decoded in vain"


def test_an_answer_may_be_empty() -> None:
    found, events, _ = answer([EOS])
    assert (found.text, found.tokens, found.pieces) == ("", (), ())
    assert not [event for event in events if isinstance(event, OutputDelta)]


@pytest.mark.parametrize("text", ["Grüße — 世界 🎈!", "naïve", "日本語のテキスト"])
def test_characters_of_several_tokens_come_whole(text: str) -> None:
    said = spoken(text)
    assert any("\N{REPLACEMENT CHARACTER}" in tokenizer().decode([token]) for token in said)
    found, events, _ = answer([*said, EOS])
    assert found.text == streamed(events) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(found.pieces)


def test_a_character_cut_off_by_the_limit_is_shown_as_such() -> None:
    said = spoken("a世")
    found, events, _ = answer(said, len(said) - 1)
    assert found.text == streamed(events) == tokenizer().decode(said[:-1])
    assert found.text.startswith("a")
    assert found.text != "a"
    assert "".join(found.pieces) == found.text


@settings(deadline=None)
@given(st.lists(st.integers(2, VOCABULARY - 1), min_size=1, max_size=30))
def test_any_tokens_stream_as_they_decode(said: list[int]) -> None:
    found, events, _ = answer([*said, EOS])
    assert found.text == streamed(events) == tokenizer().decode(said)
    assert len(found.pieces) == len(said)


@settings(deadline=None)
@given(
    st.lists(st.integers(2, VOCABULARY - 1), min_size=1, max_size=20),
    st.lists(st.text(" .aeinrst日", min_size=1, max_size=3), max_size=3),
)
@example(spoken("She sells sea shells."), ["sea s"])
@example(spoken("雨が止んだ。"), ["止ん"])
@example(spoken("雨が止んだ。"), ["雨"])
def test_an_answer_ends_before_a_stop_string(said: list[int], strings: list[str]) -> None:
    """At the first token with which the decoded text contains one; what is left of the text is
    streamed, and kept with the tokens that it comes from."""
    found, events, script = answer([*said, EOS], stop_strings=strings)
    texts = [tokenizer().decode(said[: n + 1]) for n in range(len(said))]
    read = next((n for n, t in enumerate(texts) if any(s in t for s in strings)), len(said))
    text, _ = oracle(texts[min(read, len(said) - 1)], strings)
    assert found.text == streamed(events) == "".join(found.pieces) == text
    assert found.tokens == tuple(said[: len(found.pieces)])
    assert script.read == spoken("Why?") + said[:read], "no token is decoded in vain"
    if read < len(said) and found.pieces:
        assert len("".join(found.pieces[:-1])) < len(text), "nothing is left of this token"
    assert len(found.choices) == 0, "this decoder chooses nothing"


def test_what_might_have_been_a_stop_string_is_shown_at_the_end() -> None:
    said = spoken("She sells sea")
    found, events, _ = answer([*said, EOS], stop_strings=["sea shells"])
    assert found.text == streamed(events) == "She sells sea"
    assert found.tokens == tuple(said)
    found, events, _ = answer(said, len(said), ["sea shells"])
    assert found.text == streamed(events) == "She sells sea"


def test_a_stop_string_of_byte_tokens_ends_at_once() -> None:
    """A line break is a byte token in Llama's vocabulary; its text is shown when its run ends, but
    what comes next is not waited for."""
    reader = byte_fallback()
    said = reader.convert_tokens_to_ids(["▁the", "<0x21>", "<0x0A>", "s"])
    script, events = Script(said), list[Event]()
    script.prompt_length = len(encode_prompt(reader, "the cat"))
    (found,) = answer_prompts(
        lambda choose: script, reader, ["the cat"], 9, "x", events.append, ["\n"]
    )
    assert found.text == streamed(events) == "the!"
    assert found.tokens == tuple(said[:3])
    assert found.pieces == ("the", "", "!")
    assert script.read[script.prompt_length :] == said[:2]


def test_choices_end_with_the_place_of_the_stop_string() -> None:
    model = tiny("llama")
    (whole,) = answers_of(model, ())
    assert len(whole.choices) == 12
    pairs = ["".join(whole.pieces[n : n + 2]) for n in range(11)]
    at = next(n for n in range(2, 11) if all(whole.pieces[n - 1 : n + 2]))
    (found,) = answers_of(model, (pairs[at],))
    assert found.text == "".join(whole.pieces[:at]) == whole.text.split(pairs[at])[0]
    assert found.tokens == whole.tokens[:at]
    assert found.choices == whole.choices[: at + 1]


def answers_of(model: LoadedModel, strings: Sequence[str]) -> tuple[Generation, ...]:
    return answer_prompts(
        lambda choose: Session(model.module, choose),
        *(model.tokenizer, ["The river carried timber"], 12, "bf16", lambda event: None),
        stop_strings=strings,
    )


def test_prompts_are_answered_in_order_each_from_the_start() -> None:
    events: list[Event] = []
    opened: list[Script] = []

    def session(choose: Choose) -> Script:
        opened.append(Script([*spoken(f"Answer {len(opened)}."), EOS]))
        return opened[-1]

    found = answer_prompts(session, tokenizer(), ["Why?", "Why?"], 50, "bf16", events.append)
    assert [generation.text for generation in found] == ["Answer 0.", "Answer 1."]
    assert len(opened) == 2
    deltas = [event for event in events if isinstance(event, OutputDelta)]
    assert {(delta.variant, delta.prompt) for delta in deltas} == {("bf16", 0), ("bf16", 1)}
    told = [(e.done, e.total, e.stage) for e in events if isinstance(e, Progress)]
    assert told == [(0, 2, "answers"), (1, 2, "answers")]


def test_steps_give_way_after_every_token() -> None:
    """So that several variants can answer in turn."""
    said = spoken("Because.")
    answering = Answering(
        lambda _: Script([*said, EOS]), tokenizer(), "Why?", 0, 50, "x", lambda event: None
    )
    steps = list(answering.steps())
    assert steps[:-1] == [None] * len(said)
    assert isinstance(steps[-1], Generation)


@pytest.mark.parametrize("name", FEW)
def test_a_real_model_answers_as_it_generates(name: str) -> None:
    model = tiny(name)
    prompt = "The river carried timber"
    (found,) = answer_prompts(
        lambda choose: Session(model.module, choose),
        model.tokenizer,
        [prompt],
        12,
        "bf16",
        lambda event: None,
    )
    wanted = generate(
        model.module, encode_prompt(model.tokenizer, prompt), max_new_tokens=12, eos_ids=[EOS]
    )
    assert list(found.tokens) == [token for token in wanted if token != EOS]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_an_answer_ends_with_the_context(name: str) -> None:
    """GPT-2 and OPT have no positions beyond it; the others would only talk nonsense."""
    model = tiny(name)
    prompt = "The river carried timber. " * 8
    read = len(encode_prompt(model.tokenizer, prompt))
    assert CONTEXT - 40 < read < CONTEXT
    model.tokenizer = copy.deepcopy(model.tokenizer)  # tests share it
    model.tokenizer.eos_token = None  # only the context ends it
    (found,) = answer_prompts(
        lambda choose: Session(model.module, choose),
        model.tokenizer,
        [prompt],
        60,
        "bf16",
        lambda event: None,
    )
    assert len(found.tokens) == CONTEXT - read + 1


# --- where answers part ------------------------------------------------------------------------


def said(*tokens: int, prompt: str = "Why?") -> Generation:
    return Generation(prompt, "", tokens, ("",) * len(tokens))


@pytest.mark.parametrize(
    ("ours", "theirs", "at"),
    [
        ((1, 2, 3), (1, 2, 3), None),
        ((1, 2, 3), (1, 9, 3), 1),
        ((9, 2), (1, 2), 0),
        ((1, 2), (1, 2, 3), 2),
        ((1, 2, 3), (1, 2), 2),
        ((), (1,), 0),
        ((1,), (), 0),
        ((), (), None),
    ],
)
def test_the_first_difference(ours: Any, theirs: Any, at: int | None) -> None:
    assert first_difference(said(*ours), said(*theirs)) == at


def test_without_an_original_there_is_no_difference() -> None:
    assert first_difference(said(1, 2), None) is None


def test_records_are_marked_prompt_by_prompt() -> None:
    """By the prompt itself, in whatever order; a prompt that the original lacks is left."""
    outputs = (said(1, 2), said(5, 6, prompt="How?"), said(7, prompt="Who?"))
    record = ResultRecord("rtn:4", "rtn", 4, {}, "finished", perplexity=9.0, outputs=outputs)
    original = [said(5, 0, prompt="How?"), said(1, 2)]
    marked, empty = mark_divergence(
        [record, ResultRecord("x", "rtn", 4, {}, "failed", error="why")], original
    )
    assert [output.first_divergence for output in marked.outputs] == [None, 1, None]
    assert [output.tokens for output in marked.outputs] == [(1, 2), (5, 6), (7,)]
    assert (marked.variant, marked.perplexity) == ("rtn:4", 9.0)
    assert (empty.status, empty.error, empty.outputs) == ("failed", "why", ())
    assert record.outputs == outputs, "records are not changed in place"


def test_a_reading_is_spelled() -> None:
    """The pieces together are the text; a special token has its name."""
    text = "Rivers carry naïve water — 川."
    ids = spoken(text)
    top = [[[ids[-1], 0.5], [EOS, 0.25]]] * (len(ids) - 1)
    reading = {"tokens": ids, "kl": [0.0] * (len(ids) - 1), "original": top, "variant": top}
    found = spelled(reading, tokenizer())
    assert "".join(found["text"]) == text
    assert len(found["text"]) == len(ids)
    assert found["pieces"].keys() == {str(token) for token in {*ids, EOS}}
    assert found["pieces"][str(EOS)] == "</s>"
    assert found["tokens"] == ids
    assert spelled({}, tokenizer()) == {}


def test_a_token_by_itself_keeps_its_space() -> None:
    (token, *_) = spoken(" the")
    reading = {"tokens": [token, token], "kl": [0.0], "original": [], "variant": []}
    assert spelled(reading, tokenizer())["pieces"] == {str(token): tokenizer().decode([token])}
    assert tokenizer().decode([token]).startswith(" ")


def test_a_token_by_itself_keeps_the_space_that_decoders_drop() -> None:
    """Decoders of SentencePiece's kind drop the space before a text's first token."""
    words = {"<unk>": 0, "a": 1, "▁a": 2, "▁the": 3}
    bare = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Metaspace()
    bare.decoder = decoders.Metaspace()
    named = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>")
    assert named.decode([3]) == "the"
    reading = {"tokens": [3, 3], "kl": [0.0], "original": [], "variant": []}
    found = spelled(reading, named)
    assert found["pieces"] == {"3": " the"}
    assert found["text"] == ["the", " the"]
