"""Frozen records that the rooms pass to each other: what to run, and what happened while running.

Results themselves live in `quantlab.results`; packed weights in `quantlab.packing`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Execution = Literal["packed", "simulated"]
Status = Literal["finished", "failed", "cancelled"]
OptionValue = bool | int | float | str


NAMED_BY = {"gguf": "type", "checkpoint": "path"}
"""Methods that have an option after the colon, not bits: `gguf:q4_k_m`, `checkpoint:DIR`."""


@dataclass(frozen=True, slots=True)
class VariantSpec:
    """One column of a comparison: a method, its bits, and options that differ from its defaults.

    `bits` is the number after the colon (`gptq:4`), None where the method has none to choose
    (`bf16`) or names something else instead (`gguf:q4_k_m`, kept in `options` as `type`).
    """

    method: str
    bits: int | None = None
    options: tuple[tuple[str, OptionValue], ...] = ()

    @property
    def label(self) -> str:
        """The variant as the command line writes it: `gptq:4:act_order=false`."""
        options = dict(self.options)
        head = [self.method]
        named = NAMED_BY.get(self.method)
        if named in options:
            head.append(str(options.pop(named)))
        elif self.bits is not None:
            head.append(str(self.bits))
        return ":".join(head + [f"{key}={_plain(value)}" for key, value in options.items()])

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, "bits": self.bits, "options": dict(self.options)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VariantSpec:
        return cls(data["method"], data["bits"], tuple(sorted(data["options"].items())))


def _plain(value: OptionValue) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True)
class RunSpec:
    """Everything that decides the numbers of a comparison, and nothing else.

    `calibration` and `text` are a name (`project`, `self`, `wikitext2`, `c4`) or the path of a text
    file. `window` is the length in tokens of one evaluation window; windows do not overlap.
    `group_size` applies to every variant whose method has groups and that names none itself.
    `threads` 0 means one for each physical core. `forced` are tokens that answers begin with,
    whatever the model prefers (see `quantlab.forks`); they count among `max_new_tokens`. Answers
    end before the first of `stop_strings` (see `quantlab.stops`).
    """

    model: str = "bundled"
    variants: tuple[VariantSpec, ...] = ()
    group_size: int = 64
    calibration: str = "project"
    calibration_tokens: int = 8192
    calibration_length: int = 512
    text: str = "project"
    eval_tokens: int = 8192
    window: int = 1024
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 48
    device: str = "auto"
    threads: int = 0
    seed: int = 0
    allow_pickle: bool = False
    trust_remote_code: bool = False
    forced: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["variants"] = [variant.to_json() for variant in self.variants]
        data["prompts"] = list(self.prompts)
        data["forced"] = list(self.forced)
        data["stop_strings"] = list(self.stop_strings)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunSpec:
        values = dict(data)
        values["variants"] = tuple(VariantSpec.from_json(v) for v in values["variants"])
        values["prompts"] = tuple(values["prompts"])
        values["forced"] = tuple(values.get("forced", ()))
        values["stop_strings"] = tuple(values.get("stop_strings", ()))
        return cls(**values)

    def dumps(self) -> str:
        return json.dumps(self.to_json(), sort_keys=True)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is: `variant` (its label), `stage` ('quantize', 'perplexity', …), block or step
    `done` of `total` within the stage, and the `fraction` (0 to 1) of the whole run."""

    variant: str
    stage: str
    done: int
    total: int
    fraction: float
    kind: Literal["progress"] = "progress"


@dataclass(frozen=True, slots=True)
class VariantStarted:
    """Work on a variant begins; rows for it can be laid out."""

    variant: str
    kind: Literal["variant_started"] = "variant_started"


@dataclass(frozen=True, slots=True)
class VariantFinished:
    """A variant ended (finished, failed or cancelled); `record` is `ResultRecord.to_json()`."""

    variant: str
    record: dict[str, Any] = field(default_factory=dict)
    kind: Literal["variant_finished"] = "variant_finished"


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """A piece of generated text, as it is generated."""

    variant: str
    prompt: int
    text: str
    kind: Literal["output"] = "output"


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the person should know: a fallback, a cache hit, a wait for another run."""

    message: str
    kind: Literal["notice"] = "notice"


Event = Progress | VariantStarted | VariantFinished | OutputDelta | Notice
Emit = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An `Emit` for callers that want no events."""


Choice = tuple[int, float, str]
"""A token that a model could have said: its id, its probability, its text by itself."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer: the prompt, the generated text and token ids, and where it left the original.

    `first_divergence` is the index of the first generated token that differs from the unquantized
    model's greedy answer, None where there is no difference or nothing to compare with.
    `pieces` is the text of each token, so that a page can colour them one by one. `choices` holds
    the likeliest tokens at each place, likeliest first, with one place more than tokens where the
    model ended the answer itself (or began a stop string, which is not kept); empty for answers
    that were sampled, or written before it was kept.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    first_divergence: int | None = None
    choices: tuple[tuple[Choice, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": list(self.tokens),
            "pieces": list(self.pieces),
            "first_divergence": self.first_divergence,
            "choices": [[list(choice) for choice in place] for place in self.choices],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Generation:
        return cls(
            data["prompt"],
            data["text"],
            tuple(data["tokens"]),
            tuple(data["pieces"]),
            data["first_divergence"],
            tuple(
                tuple((token, chance, text) for token, chance, text in place)
                for place in data.get("choices", ())
            ),
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will cost, computed before anything starts: seconds, and bytes of memory."""

    seconds: float
    peak_bytes: int
    note: str = ""
