"""A training that is stopped leaves checkpoints, goes on from them, and removes them at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab.errors import MethodError
from quantlab.methods import parse_variant
from quantlab.models import locate
from quantlab.prepared import read_about
from quantlab.types import Event, Progress, RunSpec
from quantlab.variants import prepare_variant
from tests.tiny import saved, token_ids

pytestmark = pytest.mark.usefixtures("exact")

VARIANT = parse_variant("efficientqat:2:block_epochs=1:e2e_epochs=2:batch_size=2")
IDS = token_ids(4, 16)


class Cancelled(BaseException):
    """As a signal would end the worker."""


def test_training_goes_on_in_another_run(home: Path, tmp_path: Path) -> None:
    source = locate(str(saved(tmp_path / "model")))
    spec = RunSpec(model=str(tmp_path / "model"), variants=(VARIANT,))
    seen: list[Progress] = []

    def stop(event: Event) -> None:
        assert isinstance(event, Progress)
        seen.append(event)
        if event.stage == "e2e_qp":
            raise Cancelled

    with pytest.raises(Cancelled):
        prepare_variant(VARIANT, source, IDS, tmp_path / "artifact", spec, stop)
    assert not (tmp_path / "artifact").exists()
    assert [event.stage for event in seen].count("block_ap") >= 4
    (kept,) = (home / "training").iterdir()
    assert sorted(path.name for path in kept.iterdir()) == [
        "block-000.safetensors", "block-001.safetensors",
    ]  # fmt: skip

    seen.clear()
    prepared = prepare_variant(VARIANT, source, IDS, tmp_path / "other", spec, seen.append)  # type: ignore[arg-type]
    assert not list((home / "training").iterdir())
    assert [event.stage for event in seen].count("block_ap") == 3, "a block was trained again"
    assert {key: len(parts) for key, parts in prepared.curves.items()} == {
        "block_ap": 2, "e2e_qp": 1,
    }  # fmt: skip
    assert read_about(tmp_path / "other") == prepared


def test_a_training_that_diverges_is_not_gone_on_from(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = locate(str(saved(tmp_path / "model")))
    spec = RunSpec(model=str(tmp_path / "model"), variants=(VARIANT,))

    def diverge(*_: object) -> None:
        raise MethodError("training diverged")

    monkeypatch.setattr("quantlab.methods.efficientqat.train_model", diverge)
    with pytest.raises(MethodError, match="diverged"):
        prepare_variant(VARIANT, source, IDS, tmp_path / "artifact", spec, lambda event: None)
    assert not list((home / "training").iterdir())
    assert not (tmp_path / "artifact").exists()
