"""The Inspect tab without a browser: every view draws, in every language and theme; every control
moves its picture; what is typed never becomes markup; more bits reach the Compare form."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from plotly.colors import sample_colorscale

from quantlab.errors import ConfigError
from quantlab.inspection import causal, survey
from quantlab.methods import configure, parse_variant
from quantlab.plots.inspect import heatmap
from quantlab.plots.templates import FOLDER as TEMPLATES
from quantlab.plots.words import FOLDER, translations, words
from quantlab.types import VariantSpec
from quantlab.ui import inspection, inspection_api, variants
from quantlab.ui import inspection_painting as painting
from quantlab.ui import inspection_views as views
from quantlab.ui.client import Client
from quantlab.ui.inspection_causal import names_of, numbers_of, raised, with_rule
from quantlab.ui.inspection_source import picked

HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
REAL = {"file": "", "name": "11.mlp.down_proj"}
BARE = {"file": "", "name": "5.mlp.up_proj"}
"""A linear whose values ship, and one whose values do not."""

pytestmark = pytest.mark.usefixtures("home")


def figure(made: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(made.plot)
    return found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("language", ["en", "ja"])
def test_every_view_draws(language: str, dark: bool) -> None:
    client = Client(language, dark)
    for chosen in (REAL, BARE):
        line, *texts = painting.origin(client, chosen)
        assert "ql-badge-precomputed" in line
        assert all("<h3>" in text and "[[" not in text for text in texts)
        peaks, note, facts, *plots = painting.outliers(client, chosen, 0.5, 4, False, "tensor")
        assert peaks.count("data-act=") == 210
        assert ('data-act="read"' in note) == (chosen is BARE)
        assert facts.count("<dd>") == (6 if chosen is REAL else 4)
        shown = [one for one in plots if one is not None]
        assert len(shown) == (3 if chosen is REAL else 1)
        for measure in ("weight", "output", "kl"):
            table, facts, *more = painting.layers(client, chosen, measure, 4)
            assert len(re.findall(r'style="background:rgb', table)) == 210
            shown += more
        for one in shown:
            layout = figure(one)["layout"]
            assert layout["paper_bgcolor"] == "rgba(0,0,0,0)"
            assert layout["title"]["text"]


def test_every_control_moves_its_picture() -> None:
    def drawn(*given: Any) -> list[str]:
        return [getattr(one, "plot", one) for one in painting.moved(Client(), REAL, *given)]

    base = (0.5, 4, False, "tensor")
    for place, other in ((0, 0.8), (1, 5), (2, True), (3, "group"), (3, "channel")):
        changed = list(base)
        changed[place] = other  # type: ignore[call-overload]
        assert drawn(*changed) != drawn(*base), (place, other)
    tables = {
        painting.layers(Client(), REAL, measure, bits)[0]
        for measure in ("weight", "output", "kl")
        for bits in (3, 4)
    }
    assert len(tables) == 6


def test_what_was_measured_here_stands_before_what_ships() -> None:
    """Linears measured again change their own cells only; each value says where it is from."""
    found = survey.load()
    (shipped,) = [one for one, came in causal.known(found.origin.fingerprint, True) if came]
    name = REAL["name"]
    here = dataclasses.replace(
        shipped, floor=0.001, cells={name: (0.5, 0.4, 0.6)}, machine="this machine"
    )
    setting = dataclasses.replace(here.setting, tokens=256)
    here = dataclasses.replace(here, setting=setting)
    causal.keep(causal.file_of(here.fingerprint, setting), here)
    values = views.values_of(found, "kl", 4, views.measured(found, 4, True))
    expected = {other: cell[0] for other, cell in shipped.cells.items()} | {name: 0.5}
    assert values == expected
    table, facts, *_ = painting.layers(Client(), REAL, "kl", 4)
    assert "Values: 1, each a comparison of its own on 256 tokens" in table
    assert "Values: 209, each a comparison of its own on 1,024 tokens" in table
    assert table.index("this machine") < table.index(shipped.machine)
    assert "0.500 (0.400 – 0.600)" in facts
    assert "<dd>0.499</dd>" in facts


def test_the_heatmap_is_logarithmic_and_has_one_tab_stop() -> None:
    values = {"0.a": 1.0, "1.a": 10.0, "0.b": 100.0}
    table = heatmap.heatmap(
        values, ["a", "b"], 2, "1.a", "en",
        label="x", spelled=lambda v: f"{v:g}", linears=[*values, "1.b"],
    )  # fmt: skip
    for name, place in (("0.a", 0.0), ("1.a", 0.5), ("0.b", 1.0)):
        (colour,) = sample_colorscale("Viridis", [place])
        assert re.search(rf'data-act="{name}"[^>]*style="background:{re.escape(colour)}"', table)
    assert re.search(r'data-act="1.b"(?![^>]*style=)[^>]*data-value=""', table)
    assert re.findall(r'data-act="([\w.]+)"[^>]*tabindex="0"', table) == ["1.a"]
    assert table.count('aria-pressed="true"') == 1
    assert [heatmap.place(v, 1, 100) for v in (0.5, 1, 10, 100, float("nan"))] == [0, 0, 0.5, 1, 1]
    assert heatmap.ends([0.0, float("nan")]) == (1.0, 1.0)


def test_a_cell_that_is_not_there_is_the_first(tmp_path: Path) -> None:
    assert picked(REAL, "7.mlp.up_proj") == [
        {"file": "", "name": "7.mlp.up_proj"},
        7,
        "mlp.up_proj",
    ]
    assert picked(REAL, HOSTILE)[0]["name"] == "0.self_attn.q_proj"
    gone = {"file": str(tmp_path / "gone.safetensors"), "name": HOSTILE}
    for made in (
        painting.outliers(Client(), gone, 0.5, 4, False, "tensor"),
        painting.moved(Client(), gone, 0.5, 4, False, "tensor"),
        painting.layers(Client(), gone, "kl", 4),
        painting.origin(Client(), gone),
    ):
        assert "is gone; read the model again" in made[0]
        assert "<script" not in made[0]


def test_blocks_and_linears_are_asked_for_in_words() -> None:
    found = survey.load()
    assert numbers_of("0-2, 29", 30) == {0, 1, 2, 29}
    assert numbers_of("", 3) == {0, 1, 2}
    assert names_of(found, "3", "down_proj o_proj") == ["3.self_attn.o_proj", "3.mlp.down_proj"]
    assert len(names_of(found, "", "")) == 210
    for text in ("30", "3-1", "a", "-1", HOSTILE):
        with pytest.raises(ConfigError, match="needs numbers from 0 to 29, such as"):
            numbers_of(text, 30)
    with pytest.raises(ConfigError, match="no linear is called lm_head; needs some of self_attn"):
        names_of(found, "", "lm_head")


def test_more_bits_become_a_rule_of_a_mixed_variant() -> None:
    data, spec = raised(variants.defaults(), "3.mlp.down_proj", 3, 8)
    assert spec.label == (
        "mixed:arithmetic=rtn:attention_bits=3:feed_forward_bits=3:pattern=3.mlp.down_proj=8"
    )
    assert len(data) == len(variants.defaults()) + 1
    data, spec = raised(data, "4.mlp.down_proj", 3, 6)
    data, spec = raised(data, "3.mlp.down_proj", 3, 5)
    assert dict(spec.options)["pattern"] == "4.mlp.down_proj=6;3.mlp.down_proj=5"
    assert len(data) == len(variants.defaults()) + 1
    config = configure(variants.read(data)[-1].spec, 64)
    assert config.kind_bits() == {"attention": 3, "feed-forward": 3}
    # A variant with a budget allocates by itself: it is left as it is.
    budget = variants.write([variants.chip(VariantSpec("mixed", None, (("budget", 4.5),)))])
    data, spec = raised(budget, "0.a", 4, 16)
    assert next(one.spec.options for one in variants.read(data)) == (("budget", 4.5),)
    assert len(data) == 2
    assert with_rule("half typed=", "0.a", 8) == "0.a=8"
    assert parse_variant(spec.label).label == spec.label


def test_the_button_writes_the_form_and_says_so(tmp_path: Path) -> None:
    data = variants.defaults()
    made = inspection._raise(Client(), REAL, data, "bundled", 4, 8)
    assert "11.mlp.down_proj has 8 bits" in made[3]
    assert made[1] == gr.skip()  # The form's model stays.
    made = inspection._raise(Client(), REAL, data, "another", 4, 8)
    assert made[1] == "bundled"
    assert "model is now bundled" in made[3]


def test_programs_get_the_same_numbers() -> None:
    shipped = json.loads((survey.BUNDLED.parent / "kl-4.json").read_text("utf-8"))["cells"]
    assert inspection_api.linear_costs() == {name: cell[0] for name, cell in shipped.items()}
    one = survey.load().linears[REAL["name"]]
    assert inspection_api.linear_costs(measure="output", bits=3)[one.name] == one.output_errors[3]
    found = inspection_api.channel_maxima(one.name, 1.0)
    assert found["before"] == one.read.peaks.tolist()
    assert found["after"] == pytest.approx([1.0] * 1536, rel=1e-5)
    for call in (
        lambda: inspection_api.linear_costs(measure=HOSTILE),
        lambda: inspection_api.linear_costs(bits=7),
        lambda: inspection_api.linear_costs("nowhere/at-all"),
        lambda: inspection_api.channel_maxima("5.x"),
        lambda: inspection_api.channel_maxima(alpha=2),
    ):
        with pytest.raises(gr.Error, match=r"^\W*(measure|bits|model|linear|alpha)"):
            call()


def test_no_text_of_the_tab_is_unused() -> None:
    sources = [*(TEMPLATES.parents[1] / "quantlab").rglob("*.py"), *TEMPLATES.glob("*.html")]
    texts = "\n".join(path.read_text("utf-8") for path in sources)
    for key in json.loads((FOLDER / "inspect" / "en.json").read_text("utf-8")):
        parts = key.split("_")
        built = any(
            f"{'_'.join(parts[:n])}_{{" in texts or f"'{'_'.join(parts[:n])}_'" in texts
            or f'"{"_".join(parts[:n])}_"' in texts
            for n in range(1, len(parts))
        )  # fmt: skip
        assert key in texts or built, key


def test_terms_are_the_same_in_every_language() -> None:
    for key in json.loads((FOLDER / "inspect" / "en.json").read_text("utf-8")):
        found = [set(re.findall(r"\[\[(\w+)\|", translations()[one][key])) for one in ("en", "ja")]
        assert found[0] == found[1], key
        for term in found[0]:
            assert words("en").has(f"learn_term_{term}")
