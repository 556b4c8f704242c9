"""The causal KL divergence is a comparison's own value, linear by linear, in every engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab import pipeline
from quantlab.inspection.causal import Setting, measure
from quantlab.models import locate
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


@pytest.mark.parametrize("native", ["", "off"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_value_is_that_of_a_comparison(
    name: str, native: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison with only that linear quantized, in the native decoder and in torch; and the
    floor is the comparison of the model in 16 bits."""
    if native:
        monkeypatch.setenv("QUANTLAB_NATIVE", native)
    elif name == "gpt2":
        pytest.skip("the native decoder has no such blocks: as without it")
    folder = saved(tmp_path / "model", name)
    names = NAMES if name == "llama" else ("0.attn.c_attn", "1.mlp.c_fc")
    _, found = measure(locate(str(folder)), SETTING, names, lambda *_: None)
    variants = [SETTING.variant(one) for one in names]
    bf16, *records = compared(folder, SETTING, VariantSpec("bf16"), *variants)
    assert found.floor == bf16.kl_divergence
    for one, record in zip(names, records, strict=True):
        assert found.cells[one] == (record.kl_divergence, *(record.kl_divergence_ci or ()))
        assert record.kl_divergence is not None
        assert record.kl_divergence > 2 * found.floor
        assert record.kernel.partition(" (")[0] in found.kernel
    assert ("native decoder" in found.kernel) == (not native)
