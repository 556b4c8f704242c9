"""The rules that split a text before byte-level merges, by the names that GGUF files give them.

A GGUF file holds the vocabulary and the merges of its tokenizer but only the *name* of these rules
(`tokenizer.ggml.pre`), and transformers does not look at the name when it reads such a file: it
splits as GPT-2 does. With SmolLM2's file, "12" would then be one token where the model was trained
on two. `restore_rules` puts the named rules in.
Source: the names are llama.cpp's (`llama-vocab.cpp`); the rules are those of the models'
own `tokenizer.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantlab.models.gguf_header import read_header

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"

Step = tuple[object, ...]
PRE_TOKENIZERS: dict[tuple[Step, ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _QWEN2, "Isolated", False), ("ByteLevel", False)): "qwen2",
    (("Split", _LLAMA3, "Isolated", False), ("ByteLevel", False)): "llama-bpe",
}
"""Steps of a pre-tokenizer, as `pre_steps` gives them -> llama.cpp's name of the rules."""


def pre_steps(pre_tokenizer: dict[str, Any] | None) -> tuple[Step, ...]:
    """A pre-tokenizer of a tokenizer.json as a flat tuple of steps, each its type and what matters
    of its options."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        inside = [pre_steps(step) for step in pre_tokenizer["pretokenizers"]]
        return tuple(step for steps in inside for step in steps)
    if kind == "ByteLevel":
        return ((kind, bool(pre_tokenizer.get("use_regex", True))),)
    if kind == "Digits":
        return ((kind, bool(pre_tokenizer["individual_digits"])),)
    if kind == "Split":
        pattern = "".join(pre_tokenizer["pattern"].values())
        return ((kind, pattern, pre_tokenizer["behavior"], bool(pre_tokenizer["invert"])),)
    return ((kind,),)


def restore_rules(tokenizer: Any, path: Path) -> None:
    """Give a tokenizer that transformers made from the GGUF file `path` the rules the file names.

    Rules of another name, and tokenizers without a fast form or without byte-level merges, stay
    as they are. Raises: ModelError for a corrupt file.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    fields = read_header(path).fields
    model, pre = (_text(fields, f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    named = next((steps for steps, name in PRE_TOKENIZERS.items() if name == pre), None)
    if backend is None or named is None or model != "gpt2":
        return
    if pre_steps(json.loads(backend.to_str())["pre_tokenizer"]) != named:
        backend.pre_tokenizer = _build(named)


def _text(fields: dict[str, Any], key: str) -> str:
    return bytes(fields[key].values[0]).decode() if key in fields else ""


def _build(steps: tuple[Step, ...]) -> Any:
    """The inverse of `pre_steps`, as an object of the `tokenizers` package."""
    from tokenizers import Regex, pre_tokenizers

    made: list[Any] = []
    for kind, *rest in steps:
        options: list[Any] = rest
        if kind == "ByteLevel":
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=options[0]))
        elif kind == "Digits":
            made.append(pre_tokenizers.Digits(individual_digits=options[0]))
        else:
            pattern, behavior, invert = options
            made.append(pre_tokenizers.Split(Regex(pattern), behavior.lower(), invert))
    return pre_tokenizers.Sequence(made)
