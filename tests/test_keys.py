"""Content keys: everything that decides a number changes them, and nothing else does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from quantlab import keys
from quantlab.keys import artifact_key, content_key, record_key
from quantlab.methods import METHODS, configure, parse_variant
from quantlab.types import RunSpec, VariantSpec
from tests.tiny import token_ids

IDS = token_ids(4, 32)
WINDOWS = list(token_ids(3, 64, seed=1))
SPEC = RunSpec(prompts=("Why is the sea salt?",), window=64, threads=2)
ARTIFACT: dict[str, Any] = {
    "fingerprint": "sha256:abc",
    "variant": parse_variant("gptq:4"),
    "config": configure(parse_variant("gptq:4")).to_json(),
    "calibration": "project",
    "ids": IDS,
    "seed": 0,
}


def test_a_key_names_a_folder() -> None:
    key = artifact_key(**ARTIFACT)
    assert len(key) == 24
    assert set(key) <= set("0123456789abcdef")


def test_the_same_inputs_have_the_same_key() -> None:
    again = ARTIFACT | {"ids": IDS.clone(), "config": dict(reversed(ARTIFACT["config"].items()))}
    assert artifact_key(**again) == artifact_key(**ARTIFACT)
    assert record_key("a", SPEC, [w.clone() for w in WINDOWS], "cpu") == record_key(
        "a", dataclasses.replace(SPEC), WINDOWS, "cpu"
    )


CHANGES: dict[str, dict[str, Any]] = {
    "model": {"fingerprint": "sha256:abd"},
    "method": {"variant": parse_variant("awq:4")},
    "bits": {"config": ARTIFACT["config"] | {"bits": 3}},
    "an option": {"config": ARTIFACT["config"] | {"damp_percent": 0.2}},
    "another text": {"calibration": "self"},
    "a token": {"ids": IDS.clone().index_fill_(0, torch.tensor([2]), 7)},
    "fewer tokens": {"ids": IDS[:3]},
    "the same tokens in other pieces": {"ids": IDS.reshape(8, 16)},
    "no data": {"ids": None, "calibration": None},
    "seed": {"seed": 1},
}


def test_every_input_of_an_artifact_counts() -> None:
    found = {what: artifact_key(**(ARTIFACT | change)) for what, change in CHANGES.items()}
    found["unchanged"] = artifact_key(**ARTIFACT)
    assert len(set(found.values())) == len(found), found


def test_spelling_a_default_out_is_no_difference() -> None:
    """`gptq:4` and `gptq:4:act_order=true` are one artifact: the whole configuration counts."""
    spelled = parse_variant("gptq:4:act_order=true:group_size=64")
    assert spelled.label != "gptq:4"
    change = {"variant": spelled, "config": configure(spelled).to_json()}
    assert artifact_key(**(ARTIFACT | change)) == artifact_key(**ARTIFACT)


def test_every_default_configuration_has_a_key_of_its_own() -> None:
    specs = [VariantSpec(name, bits) for name in METHODS for bits in METHODS[name].bits or (None,)]
    found = {artifact_key("m", spec, configure(spec).to_json(), None, None, 0) for spec in specs}
    assert len(found) == len(specs)


RECORD_CHANGES: dict[str, dict[str, Any]] = {
    "artifact": {"artifact": "b"},
    "prompts": {"spec": dataclasses.replace(SPEC, prompts=())},
    "stop strings": {"spec": dataclasses.replace(SPEC, stop_strings=(".",))},
    "length of answers": {"spec": dataclasses.replace(SPEC, max_new_tokens=5)},
    "threads": {"spec": dataclasses.replace(SPEC, threads=1)},
    "device": {"device": "cuda"},
    "window": {"spec": dataclasses.replace(SPEC, window=32)},
    "a token": {"windows": list(token_ids(3, 64, seed=2))},
    "fewer windows": {"windows": WINDOWS[:2]},
    "the same tokens in other windows": {
        "windows": list(torch.stack(WINDOWS).reshape(6, 32)),
        "spec": dataclasses.replace(SPEC, window=32),
    },
}


def test_every_input_of_a_record_counts() -> None:
    base: dict[str, Any] = {"artifact": "a", "spec": SPEC, "windows": WINDOWS, "device": "cpu"}
    found = {what: record_key(**(base | change)) for what, change in RECORD_CHANGES.items()}
    found["unchanged"] = record_key(**base)
    assert len(set(found.values())) == len(found), found


def test_what_other_variants_do_is_no_difference() -> None:
    other = dataclasses.replace(SPEC, variants=(VariantSpec("bf16"),), text="copy of it.txt")
    assert record_key("a", other, WINDOWS, "cpu") == record_key("a", SPEC, WINDOWS, "cpu")


@pytest.mark.parametrize("what", ["cpu", "versions"])
def test_another_machine_measures_anew(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = record_key("a", SPEC, WINDOWS, "cpu")
    other = {"cpu": keys.machine()["cpu"], "versions": dict(keys.machine()["versions"])}
    other[what] = "another" if what == "cpu" else {"torch": "0.0"}
    monkeypatch.setattr(keys, "machine", lambda: other)
    assert record_key("a", SPEC, WINDOWS, "cpu") != here


def test_other_code_measures_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    before = content_key({"a": 1})
    assert content_key({"a": 1}) == before
    monkeypatch.setattr(keys, "code_version", lambda: "another")
    assert content_key({"a": 1}) != before
