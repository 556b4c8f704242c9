"""The advisor's arithmetic against figures made by hand, and against real artifacts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from quantlab import advisor, precomputed
from quantlab.advisor import advice, devices, published
from quantlab.advisor.advice import PREFERENCES, VARIANTS, activation_bytes, fit
from quantlab.advisor.shapes import Matrix, ModelShape
from quantlab.advisor.sizes import ggml_nbytes
from quantlab.errors import ConfigError
from quantlab.methods import parse_variant
from quantlab.models import CATALOGUE
from quantlab.models.source import locate
from quantlab.plots.words import translations
from quantlab.types import RunSpec
from quantlab.ui import advisor as tab
from quantlab.ui import advisor_views
from quantlab.ui.client import Client
from quantlab.variants import prepare_variant
from tests.records import failed, record, run
from tests.tiny import VOCABULARY, saved

GIB = 2**30
LLAMA2 = advisor.SHAPES["Llama-2-7B"]
BUNDLED = advisor.SHAPES["bundled"]


# --- shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.id)
def test_every_catalogued_model_has_a_shape_that_adds_up(entry: Any) -> None:
    assert advisor.SHAPES[entry.id].parameters == entry.parameters


def test_well_known_shapes_add_up() -> None:
    counts = {name: shape.parameters for name, shape in advisor.WELL_KNOWN.items()}
    # As transformers counts them, from the model cards' safetensors.
    assert counts["Llama-2-7B"] == 6_738_415_616
    assert counts["Mistral-7B"] == 7_241_732_096
    assert counts["Llama-3-8B"] == 8_030_261_248
    assert counts["Llama-2-13B"] == 13_015_864_320
    assert counts["Llama-2-70B"] == 68_976_648_192


@pytest.mark.parametrize("count", [3e7, 2.5e8, 1.6e9, 3e9, 3.2e10, 1.8e11, 1e13])
def test_a_guess_comes_near_and_says_so(count: float) -> None:
    shape = advisor.guess(count)
    assert shape.guessed
    assert abs(shape.parameters / count - 1) < 0.03
    assert shape.width == shape.heads * shape.head_dim


def test_a_count_near_a_known_model_is_that_model() -> None:
    shape = advisor.guess(6.7e9)
    assert (shape.layers, shape.width, shape.kv_heads, shape.guessed) == (32, 4096, 32, True)


def test_a_shape_of_ones_own_fills_in_the_feed_forward() -> None:
    shape = advisor.of_shape(32, 4096, 32, 32, 32_000)
    assert shape.feed_forward == 11_008  # Llama-2-7B's: 4096 * 8 / 3 in whole 256s
    assert shape.parameters == LLAMA2.parameters


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: advisor.of_shape(0, 64, 4, 2, 100), "layers=0"),
        (lambda: advisor.of_shape(2, 65, 4, 2, 100), "width=65: needs a multiple of heads=4"),
        (lambda: advisor.of_shape(2, 64, 4, 3, 100), "heads=4: needs a multiple of kv_heads=3"),
        (lambda: advisor.of_shape(2, 64, 0, 1, 100), "heads=0"),
        (lambda: advisor.of_shape(2, 64, 4, 2, 10**9), "vocabulary=1000000000"),
        (lambda: advisor.guess(-7e9), "parameters=-7e+09"),
        (lambda: advisor.guess(math.nan), "parameters=nan"),
        (lambda: advisor.guess(math.inf), "parameters=inf"),
        (lambda: advisor.device("abacus"), "device: unknown 'abacus'; choose this, rtx3060"),
        (lambda: answer(context=0), "context=0"),
        (lambda: answer(batch=5000), "batch=5000"),
        (lambda: answer(use="fun"), "use: unknown 'fun'; choose research"),
        (lambda: advisor.weight_size(BUNDLED, "gptq:9"), "gptq has no 9 bits"),
        (lambda: advisor.weight_size(BUNDLED, "mixed"), "mixed: its size cannot be known"),
    ],
)
def test_bad_numbers_are_refused_with_one_message(make: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "size"),
    [
        # As about.json of real artifacts of the bundled model has them.
        ("rtn:4", 113_993_856),
        ("gptq:4", 113_993_856),
        ("rtn:4:group_size=40", 116_724_096),
        ("smoothquant:8", 163_483_776),
        ("bf16", 2 * 134_515_008),
    ],
)
def test_sizes_of_the_bundled_model_are_the_artifacts(variant: str, size: int) -> None:
    assert advisor.weight_size(BUNDLED, variant).total == size


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [("q8_0", 145), ("q6_k", 138), ("q5_k_m", 112), ("q4_k_m", 105), ("q4_0", 92), ("q3_k_m", 93)],
)
def test_gguf_sizes_are_llama_cpps_files(name: str, megabytes: float) -> None:
    """Files hold 1.7 to 1.9 MB of tokenizer and header beside the tensors."""
    size = advisor.weight_size(BUNDLED, f"gguf:{name}").total
    assert 0.9e6 < megabytes * 1e6 - size < 2.4e6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.mark.parametrize(
    "variant", ["rtn:4", "rtn:3:symmetric=true", "nf4:4", "llm_int8:8", "gguf:q4_k_m", "gguf:q8_0"]
)
def test_the_size_is_that_of_the_artifact(variant: str, tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    shape = ModelShape(
        config["num_hidden_layers"],
        config["hidden_size"],
        config["intermediate_size"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["hidden_size"] // config["num_attention_heads"],
        VOCABULARY,
        config["tie_word_embeddings"],
    )
    prepared = prepare_variant(
        *(parse_variant(variant), locate(str(tiny)), None, tmp_path / "out", RunSpec()),
        lambda event: None,
    )
    assert shape.parameters == prepared.parameters
    assert advisor.weight_size(shape, variant).total == prepared.size_bytes


def test_an_embedding_that_is_no_head_is_not_read() -> None:
    size = advisor.weight_size(LLAMA2, "bf16")
    assert size.total == 2 * 6_738_415_616
    assert size.read == size.total - 2 * 32_000 * 4096
    assert advisor.weight_size(BUNDLED, "bf16").read == 2 * 134_515_008  # it is the head


def test_a_fused_attention_matrix_has_rows_for_all_three() -> None:
    gpt2 = advisor.SHAPES["openai-community/gpt2"]
    assert gpt2.matrices[0] == Matrix("attn_qkv", 2304, 768)
    assert ggml_nbytes(2304, 768, "q4_k") == 2304 * 3 * 144


# --- memory and speed ------------------------------------------------------------------------


def test_kv_cache_by_hand() -> None:
    assert advisor.kv_cache_bytes(LLAMA2, 4096, 1) == 2 * GIB
    assert advisor.kv_cache_bytes(LLAMA2, 4096, 8) == 16 * GIB
    # 8 of 32 heads: a quarter; 8-bit numbers: half of that.
    assert advisor.kv_cache_bytes(advisor.SHAPES["Llama-3-8B"], 4096, 1) == GIB // 2
    assert advisor.kv_cache_bytes(advisor.SHAPES["Llama-3-8B"], 4096, 1, 1) == GIB // 4
    # 2 * 30 layers * 3 heads * 64 * 2 bytes = 23,040 a token.
    assert advisor.kv_cache_bytes(BUNDLED, 1, 1) == 23_040


def test_activations_by_hand() -> None:
    # float32: 10 tokens of 2 * 576 + (9 + 6) * 64 + 2 * 1536 values, and 49,152 logits.
    assert activation_bytes(BUNDLED, 10, 1) == 4 * (10 * 5184 + 49_152)
    assert activation_bytes(BUNDLED, 100_000, 1) == activation_bytes(BUNDLED, 512, 1)


def answer(
    shape: ModelShape = LLAMA2,
    context: int = 4096,
    batch: int = 1,
    device: str = "rtx4090",
    use: str = "edge",
) -> advisor.Advice:
    return advisor.advise(shape, context, batch, advisor.device(device), use)


def test_the_bound_is_bandwidth_over_bytes() -> None:
    rows = {row.variant: row for row in answer().rows}
    read = 2 * (6_738_415_616 - 32_000 * 4096)
    assert rows["bf16"].tokens_per_second == pytest.approx(1008e9 / (read + 2 * GIB), rel=1e-12)
    batched = {row.variant: row for row in answer(batch=8).rows}["bf16"].tokens_per_second
    assert batched == pytest.approx(8 * 1008e9 / (read + 16 * GIB), rel=1e-12)


def test_published_speeds_stay_below_the_bound() -> None:
    rows = {row.variant: row for row in answer(context=1).rows}
    for variant, speed in published.SPEEDS:
        bound = rows[variant].tokens_per_second
        assert bound is not None
        assert speed < bound


def test_the_longest_context_is_the_last_that_fits() -> None:
    for row in answer().rows:
        fits = advice.row(LLAMA2, row.variant, row.longest_context, 1, advisor.device("rtx4090"))
        more = advice.row(
            LLAMA2, row.variant, row.longest_context + 1, 1, advisor.device("rtx4090")
        )
        assert (fits.fit, more.fit) == ("tight", "no")


def test_fits_tight_and_too_large() -> None:
    assert [fit(total, 100) for total in (90, 91, 100, 101)] == ["fits", "tight", "tight", "no"]


# --- the choice ------------------------------------------------------------------------------


def test_every_use_and_device_has_preferences_that_are_compared() -> None:
    for names in PREFERENCES.values():
        assert set(names) <= set(VARIANTS)
    assert {use for use, _ in PREFERENCES} == set(advisor.USES)


@pytest.mark.parametrize(
    ("device", "use", "choice"),
    [
        ("a100-80", "research", "bf16"),
        ("rtx3060", "research", "llm_int8:8"),
        ("rtx4090", "production", "smoothquant:8"),
        ("rtx3060", "edge", "awq:4"),
        ("macbook-16", "production", "gguf:q8_0"),
        ("phone", "edge", "gguf:q3_k_m"),
        ("pi5", "edge", "gguf:q4_k_m"),
        ("rtx4090", "experiment", "efficientqat:2"),
    ],
)
def test_the_choice_for_llama_2_7b_at_512_tokens(device: str, use: str, choice: str) -> None:
    found = answer(context=512, device=device, use=use)
    assert found.choice is not None
    assert found.choice.variant == choice
    assert all(row.fit == "no" for row in found.passed_over)


def test_nothing_fits_is_said() -> None:
    found = answer(advisor.SHAPES["Llama-2-70B"], device="pi5")
    assert found.choice is None
    assert found.passed_over
    text = advisor_views.answer(Client(), found, None)
    assert "Nothing that suits this use fits" in text
    assert "Even " in text


def test_devices_are_as_their_specifications_multiply_out() -> None:
    table = devices.TABLE
    assert table["rtx3060"].bandwidth == 15e9 * 192 / 8
    assert table["rtx4090"].bandwidth == 21e9 * 384 / 8
    assert table["phone"].bandwidth == pytest.approx(6400e6 * 64 / 8)
    assert table["pi5"].bandwidth == pytest.approx(4267e6 * 32 / 8, rel=0.005)
    for one in table.values():
        assert 0 < one.usable < one.memory
        assert one.source


def test_this_machine_is_measured_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "measure_bandwidth", None)
    at = advisor.device("this")
    assert at.bandwidth is None
    assert 0 < at.usable <= at.memory
    found = advisor.advise(BUNDLED, 128, 1, at, "edge")
    assert all(row.tokens_per_second is None for row in found.rows)
    assert advisor.device("this", 3e10).bandwidth == 3e10


# --- what others found, and the page ---------------------------------------------------------


def test_measured_changes_are_against_the_runs_own_original() -> None:
    records = (
        record("bf16", perplexity=20.0, bits_per_weight=16.0),
        record("gptq:4:act_order=false", perplexity=22.0, bits_per_weight=6.4),
        failed("awq:4"),
    )
    found = published.measured(records)
    assert [one.change for one in found] == [0.0, pytest.approx(0.1)]
    assert found[1].size == pytest.approx(0.2)
    assert published.plain_variant(found[1].record) == "gptq:4"
    assert published.measured(records[1:])[0].change is None


def test_published_figures_keep_their_protocol() -> None:
    changes = {(one.variant, one.model): one.change for one in published.PUBLISHED}
    assert changes["awq:4", "Llama-2-7B"] == pytest.approx(5.60 / 5.47 - 1)
    assert changes["gguf:q4_k_m", "Llama-3-8B"] == pytest.approx(0.175 / 6.233)
    for one in published.PUBLISHED:
        parse_variant(one.variant)
        assert one.source
        assert one.text
        assert one.model


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_tables_set_measured_beside_published(language: str) -> None:
    finished = run(
        records=(
            record("bf16", perplexity=20.0),
            record("gptq:4", perplexity=22.0),
        )
    )
    text = advisor_views.beside(Client(language), finished)
    assert "+10.0%" in text
    assert "5.47 → 5.69" in text
    assert "+4.0%" in text
    alone = advisor_views.beside(Client(language), None)
    assert translations()[language]["advisor_nothing"] in alone
    assert "+10.0%" not in alone


@pytest.mark.parametrize("language", ["en", "ja"])
def test_before_any_run_the_precomputed_one_stands_beside(language: str) -> None:
    """And says where it was measured."""
    shipped = precomputed.run()
    text = advisor_views.beside(Client(language), shipped)
    kept = {one.variant: one for one in shipped.records}
    change = kept["awq:4"].perplexity / kept["bf16"].perplexity - 1
    assert f"{100 * change:+.1f}%" in text
    assert "ql-badge-precomputed" in text
    assert str(shipped.environment["date"])[:10] in text


def test_every_advisor_text_is_in_both_languages_and_differs() -> None:
    texts = translations()
    own = {key for key in texts["en"] if key.startswith("advisor_")}
    assert own == {key for key in texts["ja"] if key.startswith("advisor_")}
    same = {key for key in own if texts["en"][key] == texts["ja"][key]}
    assert same == {"advisor_bandwidth"}  # a number and its unit


def test_the_form_refuses_what_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = dict.fromkeys(tab.FIELDS, 1)
    values |= {"model": "bundled", "context": 2.5, "device": "pi5", "use": "edge"}
    for wrong in (2.5, None, 0, -1, math.nan, math.inf):
        shown, _ = tab.answered(Client(), "", None, *(values | {"context": wrong}).values())
        assert "Context, tokens: needs a whole number of at least 1" in shown
    counted = values | {"context": 8, "model": tab.BY_COUNT, "parameters": None}
    assert (
        "Parameters, billions: needs a number"
        in tab.answered(Client(), "", None, *counted.values())[0]
    )


def test_a_name_from_outside_never_runs_as_markup() -> None:
    evil = "<script>alert(1)</script>"
    values = dict.fromkeys(tab.FIELDS, 1) | {"model": evil, "device": evil, "use": evil}
    shown, _ = tab.answered(Client(), "", None, *values.values())
    assert "<script" not in shown
    assert "&lt;script" in shown


def test_the_function_for_programs_says_the_same() -> None:
    told = tab.advise("Llama-2-7B", 0, 4096, 1, "rtx4090", "edge")
    found = answer()
    assert found.choice is not None
    assert told["choice"] == found.choice.variant
    assert told["variants"][0]["kv_cache_bytes"] == 2 * GIB
    assert json.loads(json.dumps(told)) == told
