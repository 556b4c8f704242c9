"""Figures, table, verdicts and fragments show what the records say, and claim no more."""

from __future__ import annotations

import colorsys
import itertools
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.methods import METHODS
from quantlab.plots import FIGURES, figures, fragments, numbers, palette, placement, table, verdict
from quantlab.plots.words import translations, words
from quantlab.results import ResultRecord
from tests.records import failed, generation, record

ROOT = Path(__file__).resolve().parents[1]

# Palette


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(
        weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
    )


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("method", sorted(palette.STYLES))
def test_every_colour_stands_out_from_its_page(method: str, dark: bool) -> None:
    """Okabe and Ito's orange reaches 2.2 on white; marks carry a label, so 2 is enough there."""
    assert contrast(palette.colour(method, dark), palette.PAPER[dark]) >= (3.0 if dark else 2.0)


@pytest.mark.parametrize("dark", [False, True])
def test_text_of_figures_is_readable(dark: bool) -> None:
    assert contrast(palette.INK[dark], palette.PAPER[dark]) >= 7
    assert contrast(palette.MUTED[dark], palette.PAPER[dark]) >= 4.5


def test_every_registered_method_has_its_own_colour() -> None:
    assert set(METHODS) <= set(palette.STYLES)
    shown = [one for one in METHODS if one != "fp32"]  # The two originals share black.
    for dark in (False, True):
        colours = [palette.colour(method, dark) for method in shown]
        assert len(set(colours)) == len(shown)


def test_references_are_those_that_do_not_quantize() -> None:
    for name, method in METHODS.items():
        assert palette.style(name).reference is not method.quantizes


def test_okabe_and_ito() -> None:
    """The hues are those of the palette, whatever shade a page needs."""
    hues = {"smoothquant": "#e69f00", "gptq": "#0072b2", "awq": "#009e73", "gguf": "#d55e00"}
    for method, colour in hues.items():
        expected = colorsys.rgb_to_hls(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))[0]
        for dark in (False, True):
            own = palette.colour(method, dark)
            hue = colorsys.rgb_to_hls(*(int(own[i : i + 2], 16) / 255 for i in (1, 3, 5)))[0]
            assert abs(hue - expected) < 0.04


def test_labels() -> None:
    assert palette.variant_label("gptq:4") == "GPTQ 4-bit"
    assert palette.variant_label("gguf:q4_k_m") == "GGUF Q4_K_M"
    assert palette.variant_label("bf16") == "BF16"
    assert palette.variant_label("rtn:3:clip=true") == "RTN 3-bit (clip=true)"
    assert palette.variant_label("newcomer:4") == "newcomer 4-bit"


def test_marker_tells_bits_and_simulation() -> None:
    assert palette.marker(record("gptq:4")) == "square"
    assert palette.marker(record("gptq:8")) == "diamond"
    assert palette.marker(record("gptq:3", execution="simulated")) == "triangle-up-open"


# Numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (numbers.perplexity(29.2049), "29.20"),
        (numbers.perplexity(1234567.0), "1.2e+06"),
        (numbers.perplexity(math.inf), "∞"),
        (numbers.divergence(0.031234), "0.0312"),
        (numbers.divergence(1.2345), "1.23"),
        (numbers.divergence(123.4), "123"),
        (numbers.divergence(0.0000012345), "1.23e-06"),
        (numbers.divergence(0.0), "0"),
        (numbers.megabytes(98_400_000), "98"),
        (numbers.megabytes(280_000), "0.28"),
        (numbers.gigabytes(1_234_000_000), "1.2 GB"),
        (numbers.speed(42.4), "42"),
        (numbers.speed(4.24), "4.2"),
        (numbers.percent(0.9876), "98.8%"),
        (numbers.clock(61), "1:01"),
        (numbers.clock(3661), "1:01:01"),
        (numbers.clock(59.6), "1:00"),
        (numbers.duration(4.21), "4.2 s"),
        (numbers.duration(75), "1:15"),
        (numbers.milliseconds(0.2504), "250 ms"),
        (numbers.perplexity(None), "–"),
        (numbers.plus_minus((28.0, 32.0), "30.00"), "± 2.00"),
        (numbers.plus_minus((0.0281, 0.0343), "0.0312"), "± 0.0031"),
        (numbers.plus_minus(None, "30.00"), ""),
    ],
)
def test_numbers(text: str, expected: str) -> None:
    assert text == expected


# Figures


def default_records() -> list[ResultRecord]:
    return [
        record("bf16", size_bytes=269_000_000, bits_per_weight=16.0, perplexity=29.2),
        record("rtn:4", execution="simulated", decode_tokens_per_second=None, perplexity=36.8),
        record("gptq:4", perplexity=33.1, kl=0.05),
        record("smoothquant:8", size_bytes=143_000_000, bits_per_weight=8.5, perplexity=29.5),
        failed("awq:4"),
    ]


def points(figure: object) -> dict[str, object]:
    return {trace.name: trace for trace in figure.data if trace.mode != "lines"}  # type: ignore[attr-defined]


def test_perplexity_is_drawn_where_the_records_put_it() -> None:
    records = default_records()
    drawn = points(figures.perplexity_size(records))
    assert set(drawn) == {"BF16", "RTN 4-bit", "GPTQ 4-bit", "SmoothQuant 8-bit"}
    for one in records[:4]:
        trace = drawn[palette.short(one)]
        assert list(trace.x) == [one.size_bytes / 1e6]  # type: ignore[operator, attr-defined]
        assert list(trace.y) == [one.perplexity]  # type: ignore[attr-defined]
        assert one.perplexity is not None
        assert one.perplexity_ci is not None
        low, high = one.perplexity_ci
        assert trace.error_y.array[0] == pytest.approx(max(0, high - one.perplexity))  # type: ignore[attr-defined]
        assert trace.error_y.arrayminus[0] == pytest.approx(max(0, one.perplexity - low))  # type: ignore[attr-defined]
        assert trace.marker.color == palette.colour(one.method)  # type: ignore[attr-defined]


def test_the_original_is_left_out_of_divergence() -> None:
    drawn = points(figures.kl_bits(default_records()))
    assert set(drawn) == {"RTN 4-bit", "GPTQ 4-bit", "SmoothQuant 8-bit"}


def test_a_figure_without_values_says_so_instead_of_drawing_axes() -> None:
    alone = [one for one in default_records() if one.method == "bf16"]
    simulated = [one for one in default_records() if one.execution == "simulated"]
    assert alone
    assert simulated
    for figure in (figures.kl_bits(alone), figures.speed(simulated)):
        assert not figure.data
        (note,) = figure.layout.annotations
        assert note.text == "No finished variant has these values yet."
        axes = [figure.layout[name] for name in figure.layout if name[1:].startswith("axis")]
        assert len(axes) >= 2
        assert all(axis.visible is False for axis in axes)
    assert all(f(default_records()).layout.xaxis.visible is None for f in figures.FIGURES.values())


def test_axis_turns_logarithmic_only_when_a_variant_explodes() -> None:
    calm = figures.perplexity_size(default_records())
    assert calm.layout.yaxis.type == "linear"
    wild = [*default_records(), record("rtn:2", perplexity=4e4, perplexity_ci=(3e4, 5e4))]
    figure = figures.perplexity_size(wild)
    assert figure.layout.yaxis.type == "log"
    low, high = figure.layout.yaxis.range
    for one in figures.finished(wild):
        assert one.perplexity is not None
        assert low < math.log10(one.perplexity) < high


def test_a_divergence_of_nothing_survives_a_logarithmic_axis() -> None:
    records = [record("gptq:8", kl=0.0), record("rtn:4", kl=0.001), record("rtn:2", kl=2.0)]
    figure = figures.kl_bits(records)
    assert figure.layout.yaxis.type == "log"
    assert all(math.isfinite(end) for end in figure.layout.yaxis.range)


def test_simulated_variants_have_no_bar_but_are_named() -> None:
    figure = figures.speed(default_records())
    for trace in figure.data:
        assert list(trace.y) == ["BF16", "GPTQ 4-bit", "SmoothQuant 8-bit"]
    assert "RTN 4-bit" in figure.layout.title.subtitle.text
    decode, prefill = figure.data
    assert list(decode.x) == [40.0, 40.0, 40.0]
    assert list(prefill.x) == [500.0, 500.0, 500.0]


def test_size_bars_say_how_many_times_smaller() -> None:
    (bars,) = figures.size(default_records()).data
    assert list(bars.x) == [269.0, 98.0, 98.0, 143.0]
    assert list(bars.text) == ["269 MB", "98 MB · 2.7×", "98 MB · 2.7×", "143 MB · 1.9×"]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=12))
def test_pareto_line_holds_exactly_what_nothing_beats(pairs: list[tuple[int, int]]) -> None:
    line = figures.pareto([(float(x), float(y)) for x, y in pairs])

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            other[0] <= point[0] and other[1] <= point[1] and other != point for other in pairs
        )

    assert line == sorted({(x, y) for x, y in pairs if not beaten((x, y))})


@pytest.mark.parametrize("name", sorted(FIGURES))
@pytest.mark.parametrize("language", ["en", "ja"])
def test_figures_are_json_with_nothing_to_run(name: str, language: str) -> None:
    hostile = record("gptq:4", kernel="<img src=x onerror=alert(1)>")
    text = figures.to_json(FIGURES[name]([hostile, *default_records()], True, language))
    data = json.loads(text)
    assert data["config"]["toImageButtonOptions"]["format"] == "png"
    assert data["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"
    assert "<img" not in text
    assert "http" not in text


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_figures_of_nothing_are_figures(name: str) -> None:
    for trace in FIGURES[name]([failed("gptq:4")]).data:
        assert not list(trace.x)


def test_loss_curves_are_drawn_where_something_was_trained() -> None:
    curves = {"block_ap": [[0.5, 0.4, 0.3], [0.9, 0.6]], "e2e_qp": [[1.5, 1.25, 1.0]]}
    one = record("efficientqat:2", curves=curves)
    assert "training" in figures.drawn([record("gptq:4"), one])
    assert "training" not in figures.drawn([record("gptq:4"), failed("qat:4")])
    drawn = [(list(trace.x), list(trace.y)) for trace in figures.training([one]).data]
    assert drawn[0] == ([1, 2], [0.5, 0.9])
    assert drawn[1] == ([1, 2], [pytest.approx(0.4), pytest.approx(0.75)])
    assert drawn[2] == ([1, 2, 3], [1.5, 1.25, 1.0])


def test_hover_tells_the_essentials() -> None:
    trace = points(figures.kl_bits([record("gptq:4", kl=0.0312)]))["GPTQ 4-bit"]
    text = trace.hovertemplate  # type: ignore[attr-defined]
    for part in ("GPTQ 4-bit", "packed", "0.0312", "30.00 ± 2.00", "98 MB", "a kernel", "1:01"):
        assert part in text


# Placement of labels


def test_labels_of_crowded_points_do_not_cover_each_other() -> None:
    spots = [(0.1, 0.5), (0.1, 0.52), (0.1, 0.56), (0.15, 0.3), (0.9, 0.1)]
    labels = ["RTN 4-bit", "GPTQ 4-bit", "AWQ 4-bit", "GGUF Q4_K_M", "SmoothQuant 8-bit"]
    chosen = placement.place(spots, labels)
    boxes = [
        placement._box(
            x * placement.WIDTH, y * placement.HEIGHT, text, placement.POSITIONS[position]
        )
        for (x, y), text, position in zip(spots, labels, chosen, strict=True)
    ]
    for one, other in itertools.combinations(boxes, 2):
        assert one.overlap(other) == 0
    assert all(box.outside() == 0 for box in boxes)


def test_a_lone_label_stands_on_the_right_of_its_point() -> None:
    assert placement.place([(0.5, 0.5)], ["BF16"]) == ["middle right"]


# Evidence


def test_best_cell_needs_evidence() -> None:
    clear = [record("gptq:4", kl=0.05), record("rtn:4", kl=0.2)]
    assert table.best_cells(clear)["kl"] == "gptq:4"
    same = [record("gptq:4", kl=0.1), record("rtn:4", kl=0.1)]
    assert "kl" not in table.best_cells(same)


def test_best_cell_never_goes_to_the_original_or_to_a_lone_variant() -> None:
    assert table.best_cells([record("bf16"), record("gptq:4")]) == {}


def test_exact_ties_are_not_marked_and_speeds_never() -> None:
    records = [
        record("gptq:4", size_bytes=10, decode_tokens_per_second=90.0),
        record("rtn:4", size_bytes=10),
        record("awq:4", size_bytes=11, bits_per_weight=4.0),
    ]
    winners = table.best_cells(records)
    assert "size" not in winners
    assert winners["bits"] == "awq:4"
    assert "decode" not in winners


def noisy(variant: str, kl: float, swing: float) -> ResultRecord:
    """A record whose segments swing on their own, so that a paired interval is wide."""
    sign = 1 if variant < "b" else -1
    values = [kl + swing * sign * (-1) ** (index // 2) for index in range(32)]
    return record(variant, kl=kl, segments={"kl": values, "nll": values})


def test_verdict_names_a_clear_winner() -> None:
    (line,) = verdict.sentences([record("gptq:4", kl=0.05), record("rtn:4", kl=0.2)])
    assert line.startswith("At 4 bits, GPTQ 4-bit keeps the most: KL 0.0500 ± 0.0050 nats")
    assert "RTN 4-bit (0.200)" in line


def test_verdict_names_no_winner_without_evidence() -> None:
    (line,) = verdict.sentences([noisy("awq:4", 0.100, 0.08), noisy("gptq:4", 0.104, 0.08)])
    assert "indistinguishable" in line
    assert "most" not in line


def test_verdict_separates_the_tied_from_the_behind() -> None:
    records = [noisy("awq:4", 0.10, 0.02), noisy("gptq:4", 0.101, 0.02), noisy("rtn:4", 0.5, 0.02)]
    (line,) = verdict.sentences(records)
    assert "GPTQ 4-bit cannot be told apart" in line
    assert "clearly worse: RTN 4-bit" in line


def test_verdict_ranks_only_equal_bits() -> None:
    said = verdict.sentences([record("smoothquant:8", kl=0.01), record("gptq:4", kl=0.1)])
    assert not any("keeps the most" in line for line in said)


def test_verdict_says_what_perplexity_cannot_tell() -> None:
    original = record("bf16")
    said = verdict.sentences([original, record("smoothquant:8"), record("rtn:4", nll=3.6)])
    assert any("cannot tell SmoothQuant 8-bit from the original" in line for line in said)
    assert any("higher perplexity" in line and "RTN 4-bit" in line for line in said)


def test_verdict_of_unpaired_segments_names_nobody() -> None:
    other = record("rtn:4", segments={"kl": [0.1] * 8, "nll": [3.0] * 8})
    (line,) = verdict.sentences([record("gptq:4"), other])
    assert "no winner is named" in line


@pytest.mark.parametrize("language", ["en", "ja"])
def test_nothing_is_said_of_nothing(language: str) -> None:
    assert verdict.sentences([], language) == []
    assert verdict.sentences([record("bf16"), failed("gptq:4")], language) == []


# Fragments


def test_table_keeps_failed_and_waiting_rows_in_place() -> None:
    pending = {"awq:4": fragments.Pending("awq:4", "running", "block 3/30", 10)}
    order = ["bf16", "gptq:4", "awq:4"]
    html = fragments.results_table(
        [record("bf16"), failed("gptq:4", "no <luck>", "try > 4 bits")], pending, order
    )
    assert re.findall(r'data-variant="([^"]+)" data-state="(\w+)"', html) == [
        ("bf16", "finished"),
        ("gptq:4", "failed"),
        ("awq:4", "running"),
    ]
    assert "no &lt;luck&gt;" in html
    assert "try &gt; 4 bits" in html
    assert "block 3/30" in html


@pytest.mark.parametrize("state", ["waiting", "running", "failed", "cancelled"])
def test_a_variant_without_a_record_has_a_row_in_every_state(state: str) -> None:
    html = fragments.results_table([], {"gptq:4": fragments.Pending("gptq:4", state, "a note")})
    assert f'data-state="{state}"' in html
    block = fragments.Block("run", "Why?", 0, (fragments.Column("gptq:4", state, note="a note"),))
    assert "a note" in fragments.answers([block])


def test_table_shows_badges_and_marks() -> None:
    html = fragments.results_table(
        [
            record("gptq:4", kl=0.05, cached=True),
            record("rtn:4", kl=0.2, execution="simulated", fallbacks=("plain <b>torch</b>",)),
        ]
    )
    for name in ("packed", "simulated", "cached", "fallback"):
        assert f"ql-badge-{name}" in html
    assert len(re.findall(r'data-key="kl"[^>]*class="ql-best"', html)) == 1
    assert "plain &lt;b&gt;torch&lt;/b&gt;" in html


def test_cells_sort_by_their_numbers() -> None:
    html = fragments.results_table([record("gptq:4", perplexity=33.125)])
    assert re.search(r'data-key="perplexity" data-value="33.125"', html)


def columns(*records: ResultRecord) -> fragments.Block:
    return fragments.Block(
        "run", "Why?", 0, tuple(fragments.Column(r.variant, r.status, r) for r in records)
    )


def test_answers_ring_the_first_other_token_and_tint_the_rest() -> None:
    original = record("bf16", outputs=(generation("", " the", " sea", " is", " salt"),))
    other = record("gptq:4", outputs=(generation("", " the", " sea", " was", " red", first=2),))
    html = fragments.answers([columns(other, original)])
    assert html.index('data-variant="bf16"') < html.index('data-variant="gptq:4"')
    assert len(re.findall(r"<mark", html)) == 1
    assert re.search(r"the sea <mark class=\"ql-first\"[^>]*>was</mark>", html)
    assert '<span class="ql-after"> red</span>' in html
    assert "Token 3: the first that differs. The original has “␣is” here." in html
    assert "tokens shared: 2 of 4" in html


def test_equal_answers_are_said_to_be_equal() -> None:
    original = record("bf16", outputs=(generation("", "a", "b"),))
    same = record("gptq:4", outputs=(generation("", "a", "b"),))
    html = fragments.answers([columns(original, same)])
    assert "tokens shared: all 2" in html
    assert "<mark" not in html


def test_an_answer_that_ends_early_is_ringed_at_its_end() -> None:
    cut = fragments.pieces(generation("", "a", first=1), ("a", "b"), words("en"))
    assert [part["text"] for part in cut] == ["a", "∎"]


def test_a_letter_of_several_tokens_is_ringed_whole() -> None:
    cut = fragments.pieces(generation("", "a", "", "", "海", "b", first=1), ("a", "x"), words())
    assert [(part["kind"], part["text"]) for part in cut] == [
        ("shared", "a"),
        ("first", "海"),
        ("after", "b"),
    ]


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x onerror=1>'])
def test_what_models_and_people_write_cannot_run(hostile: str) -> None:
    answer = generation("", "x", hostile, hostile, first=1)
    block = fragments.Block(
        "run",
        hostile,
        0,
        (
            fragments.Column("bf16", "finished", record("bf16", outputs=(generation(hostile),))),
            fragments.Column("gptq:4", "finished", record("gptq:4", outputs=(answer,))),
            fragments.Column("rtn:4", "running", None, hostile, hostile),
            fragments.Column("awq:4", "failed", failed("awq:4", hostile, hostile)),
        ),
        hostile,
    )
    html = fragments.answers([block])
    html += fragments.results_table([failed("awq:4", hostile, hostile)])
    html += fragments.results_table([record("gptq:4", kernel=hostile, config={hostile: hostile})])
    assert "<script" not in html
    assert "<img" not in html


# Words


def places(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


def test_every_language_has_the_same_texts() -> None:
    known = translations()
    assert set(known) >= {"en", "ja"}
    for language, texts in known.items():
        assert texts.keys() == known["en"].keys(), language
        for key, text in texts.items():
            assert text.strip() or key.startswith("list_"), (language, key)
            assert places(text) == places(known["en"][key]), (language, key)


def test_every_text_that_is_asked_for_exists() -> None:
    sources = [*(ROOT / "quantlab").rglob("*.py"), *(ROOT / "assets/templates").glob("*.html")]
    asked = {
        key
        for path in sources
        for key in re.findall(r"""(?:say|i18n)\(["'](\w+)["'][,)]""", path.read_text("utf-8"))
    }
    assert len(asked) > 100
    assert asked <= translations()["en"].keys()


def test_every_column_and_badge_is_explained() -> None:
    texts = translations()["en"]
    for column in table.COLUMNS:
        assert f"column_{column.key}" in texts
        assert f"term_{column.key}" in texts
    for badge in ("packed", "simulated", "failed", "cancelled", "cached", "fallback"):
        assert f"badge_{badge}" in texts
        assert f"term_{badge}" in texts


def test_an_unknown_language_is_english() -> None:
    assert words("xx-YY").language == "en"
    assert words("ja-JP").language == "ja"
    assert words(None).language == "en"
