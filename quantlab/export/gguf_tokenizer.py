"""The tokenizer of a GGUF file: copied from the GGUF file that a model came from, else rebuilt from
its fast tokenizer and compared with it in llama.cpp.

llama.cpp does not read the rules that split a text before the merges; a file only names them
(`tokenizer.ggml.pre`). A wrong name gives a file that loads, speaks, and is quietly worse, and
nobody who gets the file can see why. So a difference is an error here and not a warning.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import ModelError
from quantlab.export.gguf_model import title
from quantlab.models import LoadedModel
from quantlab.models.gguf_header import ARRAY, read_header
from quantlab.models.pre_tokenizers import PRE_TOKENIZERS, pre_steps

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's types of tokens."""

SPACE = "\u2581"
"""SentencePiece's visible space."""

CANDIDATES = ("gpt-2", "llama-bpe", "qwen2", "smollm", "default")
"""Tried in turn, by the probe, for a pre-tokenizer that is not in the table."""

PROBE = (
    "The quick brown fox jumps over 12 lazy dogs; it's 3.14159, they'll say, and WE'RE DONE.",
    "  two  spaces,   three\n\nlines\n \n  indented\ttabs \t \n\n\n end  ",
    "columns of numbers:  7   42    365     1024\n",
    "for (int i = 0; i < 1000000; ++i) { x[i] += 0x1F * y->z; } // done!\r\n",
    "na\u00efve caf\u00e9, \u00dcbergr\u00f6\u00dfe, \u041c\u043e\u0441\u043a\u0432\u0430 2024, "
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002",
    "\U0001f600\U0001f680 \u2192 \u20ac99 \u2014 \u201cquoted\u201d \u00bd \u2163 HTTP404Error's "
    "snake_case camelCase ... $$$ #1 @you",
)
"""Short texts on which the rules above, and most others, differ from one another. They are in
composed form (NFC): llama.cpp normalizes nothing."""


@dataclass(frozen=True)
class Vocabulary:
    """What a file keeps of a tokenizer. `model` 'gpt2' merges byte-level pairs in the order of
    `merges`, 'llama' whatever neighbours make the piece with the highest score."""

    model: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]


def add_tokenizer(writer: Any, model: LoadedModel, rows: int) -> None:
    """All tokenizer fields into a gguf.GGUFWriter. rows: rows of the embedding.

    Raises: ModelError for a tokenizer that llama.cpp does not have.
    """
    if model.gguf is not None:
        _copy(writer, model.gguf, rows)
        return
    tokenizer = model.tokenizer
    vocabulary, rules = read_vocabulary(tokenizer, rows)
    probe = [(text, _encode(tokenizer, text)) for text in PROBE]
    trouble = ""
    for pre in rules:

        def add(target: Any, pre: str = pre) -> None:
            _add_vocabulary(target, vocabulary, pre)
            _add_special(target, model)

        def named(target: Any, add: Callable[[Any], None] = add) -> None:
            target.add_name(title(model))
            add(target)

        difference = _difference(writer.arch, named, probe)
        if difference is None:
            add(writer)
            return
        trouble = trouble or difference
    tried = f"rules {rules[0]!r}" if len(rules) == 1 else "any of the rules " + ", ".join(rules)
    raise ModelError(
        f"model: with {tried}, llama.cpp reads text differently from its tokenizer: {trouble}",
        hint="keep the QuantLab format, or start from a GGUF file, whose tokenizer is copied",
    )


def _copy(writer: Any, path: Path, rows: int) -> None:
    """Every tokenizer field (and the licence) of a GGUF file, byte for byte."""
    from gguf import GGUFValueType

    fields = read_header(path).fields
    count = len(fields["tokenizer.ggml.tokens"].values) if "tokenizer.ggml.tokens" in fields else 0
    if count != rows:
        raise ModelError(f"model: {path.name} has {count} tokens and {rows} embedding rows")
    for key, field in fields.items():
        if not key.startswith(("tokenizer.", "general.license")) or not field.values:
            continue
        if field.kind == ARRAY:
            inner = GGUFValueType(field.inner)
            writer.add_key_value(key, field.values, GGUFValueType.ARRAY, sub_type=inner)
        else:
            writer.add_key_value(key, field.values[0], GGUFValueType(field.kind))


def read_vocabulary(tokenizer: Any, rows: int) -> tuple[Vocabulary, Sequence[str]]:
    """The vocabulary of a fast tokenizer, padded to `rows`, and llama.cpp's names to try for its
    pre-tokenizer. Raises: ModelError for kinds of tokenizers that llama.cpp does not have."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("model: its tokenizer has no tokenizer.json form, which GGUF is made from")
    document = json.loads(backend.to_str())
    body = document["model"]
    if body["type"] != "BPE":
        raise ModelError(f"model: GGUF files are written for BPE tokenizers, not {body['type']}")
    steps = pre_steps(document["pre_tokenizer"])
    pieces = bool(body.get("byte_fallback"))
    if not pieces and not any(step[0] == "ByteLevel" for step in steps):
        raise ModelError("model: its BPE tokenizer works neither on bytes nor falls back to them")
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in body["merges"]]
    tokens, types = _tokens(document, rows)
    if not pieces:
        known = PRE_TOKENIZERS.get(steps)
        joined = [f"{left} {right}" for left, right in merges]
        names = CANDIDATES if known is None else (known,)
        return Vocabulary("gpt2", tokens, types, joined, []), names
    # SentencePiece merges the pair whose result scores highest: the earlier its first merge.
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    return Vocabulary("llama", tokens, types, [], scores), ("default",)


def _tokens(document: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens; rows of the embedding that no token uses are unused."""
    body = document["model"]
    texts = [f"[PAD{index}]" for index in range(rows)]
    types = [UNUSED] * rows
    added = {entry["id"]: entry for entry in document["added_tokens"]}
    most = max([*body["vocab"].values(), *added], default=-1) + 1
    if most > rows:
        raise ModelError(f"model: its tokenizer has {most} tokens, its embedding only {rows} rows")
    for text, index in body["vocab"].items():
        is_byte = body.get("byte_fallback") and len(text) == 6 and text.startswith("<0x")
        texts[index], types[index] = text, BYTE if is_byte else NORMAL
    for index, entry in added.items():
        texts[index], types[index] = entry["content"], CONTROL if entry["special"] else USER_DEFINED
    if body.get("byte_fallback") and body.get("unk_token") in body["vocab"]:
        types[body["vocab"][body["unk_token"]]] = UNKNOWN
    return texts, types


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, pre: str) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_token_scores(vocabulary.scores)


def _add_special(writer: Any, model: LoadedModel) -> None:
    """Special tokens, what is put around a text, and the chat template."""
    tokenizer = model.tokenizer
    ids = {name: _special_id(model, name) for name in ("bos", "eos", "unk", "pad")}
    if ids["eos"] is None:
        # llama.cpp would take token 11 (a comma, in GPT-2) for the end.
        raise ModelError("model: it names no end-of-text token, and llama.cpp needs one")
    for name, value in ids.items():
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(value)
    plain = _encode(tokenizer, "a", special=False)
    whole = _encode(tokenizer, "a")
    writer.add_add_bos_token(whole != plain and whole[:1] == [ids["bos"]])
    writer.add_add_eos_token(whole != plain and whole[-1:] == [ids["eos"]])
    first = tokenizer.convert_ids_to_tokens(plain[0]) if plain else ""
    writer.add_add_space_prefix(str(first).startswith(SPACE))
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _special_id(model: LoadedModel, name: str) -> int | None:
    """Of the tokenizer, or of the configuration where the tokenizer has none."""
    for owner in (model.tokenizer, model.module.config):
        value = getattr(owner, f"{name}_token_id", None)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and value >= 0:
            return value
    return None


def _encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def _difference(
    arch: str, add: Callable[[Any], None], probe: list[tuple[str, list[int]]]
) -> str | None:
    """How llama.cpp reads the first text that it reads differently; None where it agrees."""
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        writer = GGUFWriter(path, arch)
        add(writer)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        found = llama_tokens(path, [text for text, _ in probe])
    for (text, wanted), ids in zip(probe, found, strict=True):
        if wanted != ids:
            at = next((i for i, (a, b) in enumerate(zip(wanted, ids)) if a != b), 0)  # noqa: B905
            return f"of {text[:40]!r}, token {at} is {ids[at : at + 4]}, not {wanted[at : at + 4]}"
    return None


def llama_tokens(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text by llama.cpp, with what it puts around a text.

    Only the vocabulary of the file is read. Raises: ModelError when llama.cpp refuses it.
    """
    import llama_cpp

    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it prints what it reads, and below that its warnings
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = None
    try:
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise ModelError("model: llama.cpp cannot load its tokenizer")
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        found = []
        for text in texts:
            data = text.encode()
            room = (llama_cpp.llama_token * (len(data) + 16))()
            count = llama_cpp.llama_tokenize(
                vocabulary, data, len(data), room, len(room), True, False
            )
            found.append(list(room[: max(count, 0)]))
        return found
    finally:
        if model:
            llama_cpp.llama_model_free(model)
        logger.setLevel(level)
