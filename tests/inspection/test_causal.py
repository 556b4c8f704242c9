"""The causal KL divergence is a comparison's own value, linear by linear, in every engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab import pipeline
from quantlab.errors import ConfigError
from quantlab.inspection import causal, survey
from quantlab.inspection.causal import Setting, measure
from quantlab.inspection.exchange import Engine
from quantlab.models import load, locate
from quantlab.native_decoder import NativeDecoder
from quantlab.packing import PackedWeight
from quantlab.results import ResultRecord
from quantlab.store import Store
from quantlab.types import RunSpec, VariantSpec
from tests.tiny import saved

SETTING = Setting(bits=3, group_size=64, tokens=128, window=64)
NAMES = ("0.self_attn.v_proj", "1.mlp.down_proj")


def compared(model: Path, setting: Setting, *variants: VariantSpec) -> list[ResultRecord]:
    """What `compare` makes of these variants on the same text."""
    spec = RunSpec(
        model=str(model),
        variants=variants,
        group_size=setting.group_size,
        text=setting.text,
        eval_tokens=setting.tokens,
        window=setting.window,
        max_new_tokens=1,
    )
    found = pipeline.compare(spec, store=Store())
    assert [record.status for record in found] == ["finished"] * len(found), found
    return found


@pytest.mark.parametrize(
    ("name", "native", "names"),
    [
        ("llama", "", NAMES),
        ("llama", "off", NAMES),
        ("gpt2", "off", ("0.attn.c_attn", "1.mlp.c_fc")),
    ],
)
def test_the_value_is_that_of_a_comparison(
    name: str,
    native: str,
    names: tuple[str, str],
    tmp_path: Path,
    home: Path,
    request: pytest.FixtureRequest,
) -> None:
    """A comparison with only that linear quantized, in the native decoder and in torch; and the
    floor is the comparison of the model in 16 bits. Equal to the last digit."""
    if native:
        request.getfixturevalue("native_off")
    folder = saved(tmp_path / "model", name)
    _, found = measure(locate(str(folder)), SETTING, names, lambda *_: None)
    variants = [SETTING.variant(one) for one in names]
    bf16, *records = compared(folder, SETTING, VariantSpec("bf16"), *variants)
    assert found.floor == bf16.kl_divergence
    assert list(found.cells) == list(names)
    for one, record in zip(names, records, strict=True):
        assert found.cells[one] == (record.kl_divergence, *(record.kl_divergence_ci or ()))
        assert record.kl_divergence is not None
        assert record.kl_divergence > 2 * found.floor
        assert record.kernel == found.kernel or not native
    assert ("native decoder" in found.kernel) == (not native)


def test_what_was_measured_is_kept_and_not_measured_again(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = locate(str(saved(tmp_path / "model")))
    seen: list[str] = []
    engine = Engine.quantized

    def counted(self: Engine, name: str, weight: PackedWeight) -> Any:
        seen.append(name)
        return engine(self, name, weight)

    monkeypatch.setattr(Engine, "quantized", counted)

    def cut(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("causal", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(source, SETTING, (), cut)
    path = causal.file_of(source.fingerprint, SETTING)
    half = causal.read(path)
    assert half is not None
    assert list(half.cells) == seen[:2] == ["0.self_attn.q_proj", "0.self_attn.k_proj"]
    again, found = measure(source, SETTING, (), lambda *_: None)
    assert again == path
    assert len(seen) == len(found.cells) == 14
    assert {name: found.cells[name] for name in half.cells} == half.cells
    assert found.floor == half.floor
    assert causal.read(path) == found
    assert [p.suffix for p in path.parent.iterdir()] == [".json"]
    other = dataclasses.replace(SETTING, bits=4)
    assert causal.file_of(source.fingerprint, other) != path
    assert [one for one, _ in causal.known(source.fingerprint, False)] == [found]
    assert causal.known("another", False) == []


def test_a_linear_that_is_not_there(tmp_path: Path, home: Path) -> None:
    source = locate(str(saved(tmp_path / "model")))
    with pytest.raises(ConfigError, match=r"called 0\.up; they are called like 1\.mlp\.down_proj"):
        measure(source, SETTING, ("0.up",), lambda *_: None)
    assert not (home / "inspect").exists()


def test_damage_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("", "{}", "[1]", '{"setting": {"bits": 3}}', "null"):
        path.write_text(text)
        assert causal.read(path) is None
    assert causal.read(tmp_path / "none.json") is None


def test_an_exchange_leaves_no_trace(tmp_path: Path) -> None:
    """Logits are the same after it as before, and its memory is let go of."""
    model = load(str(saved(tmp_path / "model")), dtype=torch.bfloat16)
    decoder = NativeDecoder(model.module, 64)
    ids = list(range(2, 34))
    before = decoder.read(ids, 0, every=True)[1]
    held, info = decoder._records.held, decoder.info
    linear = torch.nn.Linear(96, 64, bias=False).bfloat16()
    with decoder.exchanged(1, "mlp.down_proj", linear):
        assert not torch.equal(decoder.read(ids, 0, every=True)[1], before)
    assert torch.equal(decoder.read(ids, 0, every=True)[1], before)
    assert (decoder._records.held, decoder.info) == (held, info)


def test_the_process_tells_what_it_does(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "model")
    wanted = ["--bits=3", "--tokens=200", "--linears", "1.mlp.up_proj", "--", str(folder)]
    assert causal.main(wanted) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"stage": "causal", "done": 0, "total": 1} in told
    found = causal.read(Path(told[-1]["path"]))
    assert found is not None
    # The window leaves room for a begin token in the model's context of 128.
    assert found.setting == Setting(bits=3, tokens=200, window=127)
    assert list(found.cells) == ["1.mlp.up_proj"]
    assert causal.main(["--linears", "9.x", "--", str(folder)]) == 2
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["error"].startswith("linears: no linear of this model is called 9.x")


def test_what_ships_covers_the_bundled_model() -> None:
    shipped = causal.known(survey.load().origin.fingerprint, True)
    (found,) = [one for one, came in shipped if came]
    assert found.cells.keys() == survey.load().linears.keys()
    assert (found.setting.bits, found.setting.tokens) == (4, 1024)
    for value, low, high in found.cells.values():
        assert found.floor < low <= value <= high
    assert found.date.startswith("20")
