"""Every pair has its sentence: the interval decides what is said, on the page and elsewhere."""

from __future__ import annotations

import math
import re

import pytest

from quantlab import report
from quantlab.cli.terminal import print_verdict
from quantlab.plots import numbers, pairs, verdict
from quantlab.plots.words import words
from quantlab.results import ResultRecord
from tests.records import SEGMENTS, failed, record, run

SAY = words("en")


def swinging(variant: str, mean: float, swing: float, *, turn: int) -> ResultRecord:
    """A record whose segments swing by itself around `mean`, in both measures."""
    values = [mean + swing * (-1) ** (index // turn) for index in range(SEGMENTS)]
    return record(variant, segments={"nll": values, "kl": values})


def normal_half_width(swing: float) -> float:
    """Half of a 95% interval of the mean of `SEGMENTS` values that are `swing` off their mean, by
    the normal distribution instead of the bootstrap."""
    return 1.96 * swing / math.sqrt(SEGMENTS)


def parsed(line: str) -> tuple[float, float]:
    found = re.search(r"(-?[\d.]+) ± ([\d.]+)", line)
    assert found, line
    return float(found[1]), float(found[2])


def test_of_two_quantized_the_worse_is_named_first_with_its_distance() -> None:
    better = swinging("gptq:4", 0.10, 0.0, turn=1)
    worse = swinging("rtn:4", 0.25, 0.03, turn=1)
    for records in ([better, worse], [worse, better]):
        (line,) = pairs.sentences(records)
        assert line.startswith("RTN 4-bit is worse than GPTQ 4-bit by 0.15")
        gap, half = parsed(line)
        assert gap == pytest.approx(0.15, abs=0.0005)
        # 4000 resamples find the quantiles to about 3%; two digits are rounded to 5%.
        assert half == pytest.approx(normal_half_width(0.03), rel=0.1)


def test_an_interval_over_zero_names_no_winner() -> None:
    (line,) = pairs.sentences(
        [swinging("awq:4", 0.104, 0.08, turn=1), swinging("gptq:4", 0.100, 0.08, turn=2)]
    )
    assert "indistinguishable on this text" in line
    assert "worse" not in line
    assert parsed(line)[0] == pytest.approx(0.004, abs=0.001)


def test_the_original_is_compared_by_the_nats_lost() -> None:
    """Its KL divergence to itself is zero, so by that measure everything would be worse."""
    records = [
        record("bf16", nll=3.40),
        record("rtn:4", nll=3.52, kl=0.2),
        record("smoothquant:8", nll=3.40, kl=0.2),
        record("awq:4", nll=3.35, kl=0.2),
    ]
    lines = pairs.sentences(records)
    assert len(lines) == 3 + 3
    assert lines[0] == "RTN 4-bit predicts this text worse than the original by " + (
        "0.1200 ± 0.0000 nats a token."
    )
    assert "SmoothQuant 8-bit and the original are indistinguishable" in lines[1]
    assert "AWQ 4-bit predicts this text better than the original by 0.0500" in lines[2]
    assert [p.measure for p in pairs.pairs(records)] == ["nll"] * 3 + ["kl"] * 3


def test_what_failed_or_was_measured_elsewhere_is_not_ranked() -> None:
    other = record("rtn:4", segments={"kl": [0.1] * 8, "nll": [3.0] * 8})
    lines = pairs.sentences([record("gptq:4"), other, failed("awq:4")])
    assert lines == [
        "GPTQ 4-bit and RTN 4-bit were not measured on the same segments, so they cannot be "
        "compared."
    ]
    for few in ([], [record("bf16")], [record("bf16"), failed("rtn:4")]):
        assert pairs.sentences(few) == []
        assert pairs.box(few) == ""


def test_the_matrix_says_the_same_from_both_sides() -> None:
    records = [record("bf16"), record("gptq:4", kl=0.05), record("rtn:4", kl=0.2, nll=3.5)]
    page = pairs.box(records)
    rows = re.findall(r"<tr>\s*<th scope=\"row\".*?</tr>", page, re.DOTALL)
    cells = [re.findall(r"<td.*?</td>", row, re.DOTALL) for row in rows]
    kinds = [[re.findall(r"ql-pair-(\w+)|ql-muted", cell) for cell in row] for row in cells]
    assert kinds == [[["same"], [""], ["better"]], [["worse"], ["worse"], [""]]]
    assert "0.15" in cells[0][2]
    assert "0.15" in cells[1][1]
    assert "95% interval of row minus column: -0.15" in cells[0][2]
    assert "95% interval of row minus column: 0.14" in cells[1][1]
    assert page.count("RTN 4-bit is worse than GPTQ 4-bit by") == 2 + 1  # both tips, one line


def test_a_hostile_name_does_not_run() -> None:
    hostile = "checkpoint:/a/<img src=x onerror=alert(1)>"
    page = pairs.box([record("bf16"), record(hostile, bits=4)])
    assert "<img" not in page
    assert "&lt;img" in page


def test_report_and_terminal_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    records = [record("bf16"), record("gptq:4", kl=0.05), record("rtn:4", kl=0.2, nll=3.5)]
    said = pairs.sentences(records)
    assert len(said) == 3
    print_verdict(records)
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert printed[: len(verdict.sentences(records))] == verdict.sentences(records)
    assert printed[-3:] == said
    page = report.to_html(run(*records))
    for line in said:
        assert f"<li>{line}</li>" in page
    japanese = pairs.sentences(records, "ja")
    assert len(japanese) == 3
    assert "RTN 4-bit は GPTQ 4-bit より" in japanese[2]


def test_one_and_many_are_spoken_of_alike() -> None:
    """A verb that would have to change with the number of names is not there."""
    for names in (["awq:4"], ["awq:4", "gptq:4"]):
        lower = [record(name, nll=3.0, kl=0.1) for name in names]
        said = " ".join(verdict.sentences([record("bf16"), *lower]))
        assert "is lower than the original's" in said
        assert "measures a" not in said


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ((0.0402, 0.0302, 0.0502), "0.040 ± 0.010"),
        ((-0.0031, -0.0131, 0.0069), "-0.003 ± 0.010"),
        ((5.21, 4.0, 6.4), "5.2 ± 1.2"),
        ((523.4, 500.0, 550.0), "523 ± 25"),
        ((-0.00004, -0.01, 0.0098), "0.0000 ± 0.0099"),
        ((0.25, 0.25, 0.25), "0.2500 ± 0.0000"),
        ((math.inf, 0.0, math.inf), "–"),
    ],
)
def test_a_difference_has_two_digits_of_its_interval(
    ends: tuple[float, float, float], text: str
) -> None:
    assert numbers.difference(*ends) == text
