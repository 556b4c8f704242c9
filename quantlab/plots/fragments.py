"""The results table, the verdict and the answers as HTML, for the page and the report alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quantlab.plots import numbers, palette, table, verdict
from quantlab.plots.templates import render
from quantlab.plots.words import Words, words
from quantlab.results import ResultRecord
from quantlab.types import Generation

SHOWN = [column.key for column in table.COLUMNS if column.narrow]


@dataclass(frozen=True)
class Pending:
    """A variant without a record yet: `state` waiting or running, and how far it is."""

    variant: str
    state: str
    note: str
    percent: int = 0


def results_table(
    records: Sequence[ResultRecord],
    pending: Mapping[str, Pending] | None = None,
    order: Sequence[str] = (),
    language: str | None = None,
    marks: Sequence[str] = (),
) -> str:
    """One row a variant in `order` (default: the records'); '' when there is nothing to show.
    `marks` are badges that every record gets on top of its own."""
    say = words(language)
    by_name = {record.variant: record for record in records}
    waiting = dict(pending or {})
    names = list(order) or [*by_name, *(name for name in waiting if name not in by_name)]
    winners = table.best_cells(records)
    rows = []
    for name in names:
        if name in by_name:
            rows.append(_record_row(by_name[name], winners, say, marks))
        elif name in waiting:
            rows.append(_pending_row(waiting[name]))
    return render("table.html", language, rows=rows, columns=SHOWN)


def _record_row(
    record: ResultRecord, winners: dict[str, str], say: Words, marks: Sequence[str]
) -> dict[str, object]:
    done = record.status == "finished"
    return {
        "variant": record.variant,
        "method": record.method,
        "label": palette.short(record),
        "state": record.status,
        "cells": [cell for cell in table.cells(record, winners) if cell.key in SHOWN]
        if done
        else [],
        "badges": [*table.badges(record), *marks],
        "error": reason(record, say),
        "hint": record.hint,
        "details": details(record, say) if done else [],
    }


def reason(record: ResultRecord, say: Words) -> str:
    """Why there is no result; a variant that was cancelled needs no further words."""
    if record.error:
        return record.error
    return "" if record.status == "cancelled" else say("error_unknown")


def _pending_row(row: Pending) -> dict[str, object]:
    return {
        "variant": row.variant,
        "method": row.variant.partition(":")[0],
        "label": palette.variant_label(row.variant),
        "state": row.state,
        "cells": [],
        "badges": [],
        "details": [],
        "note": row.note,
        "percent": row.percent,
        "error": "",  # A run that ended before this variant's turn tells why by itself.
        "hint": None,
    }


def details(record: ResultRecord, say: Words) -> list[tuple[str, str, str]]:
    """What the table leaves out: kernel, fallbacks, options, intervals, artifact. Names, values,
    and the keys of the texts that explain them."""
    perplexity = interval(record.perplexity_ci, numbers.perplexity)
    divergence = interval(record.kl_divergence_ci, numbers.divergence)
    bits = str(record.activation_bits or numbers.NOTHING)
    rows = [
        (say("column_kernel"), record.kernel or numbers.NOTHING, "tip_detail_kernel"),
        (say("column_memory"), numbers.gigabytes(record.peak_rss_bytes), "tip_detail_memory"),
        (say("detail_activation_bits"), bits, "tip_detail_activation_bits"),
        (say("detail_perplexity_ci"), perplexity, "tip_detail_perplexity_ci"),
        (say("detail_kl_ci"), divergence, "tip_detail_kl_ci"),
    ]
    rows += [(*row, "tip_detail_allocation") for row in allocation(record, say)]
    rows += [
        (key.replace("_", " "), _plain(value), "tip_detail_option")
        for key, value in record.config.items()
    ]
    if peer := record.details.get("peer"):
        made = f"{peer['peer']} {peer['version']} ({peer['settings']})"
        rows.append((say("detail_peer"), made, "tip_detail_peer"))
    rows += [(say("badge_fallback"), one, "tip_detail_fallback") for one in record.fallbacks]
    if record.artifact:
        rows.append((say("detail_artifact"), record.artifact, "tip_detail_artifact"))
    return rows


def allocation(record: ResultRecord, say: Words) -> list[tuple[str, str]]:
    """Mixed precision: what was predicted of the chosen widths and what came of them."""
    found = record.details.get("allocation")
    if not found:
        return []
    predicted, measured = found["predicted_bits_per_weight"], found["measured_bits_per_weight"]
    rows = [(say("detail_allocation_size"), f"{predicted:.4f} / {measured:.4f}")]
    if "predicted_kl_divergence" in found:
        both = [found["predicted_kl_divergence"], found["measured_kl_divergence"]]
        name = say("detail_allocation_kl", tokens=f"{found['tokens']:,}")
        rows.append((name, " / ".join(map(numbers.divergence, both))))
        how = say("detail_allocation_how", bits=found["measured_at_bits"])
        rows.append((say("detail_allocation_method"), how))
    counts = Counter(found["bits"].values())
    widths = [say("detail_allocation_one", bits=b, count=counts[b]) for b in sorted(counts)]
    rows.append((say("detail_allocation_widths"), ", ".join(widths)))
    return rows


def interval(ends: tuple[float, float] | None, text: object) -> str:
    """A 95% interval in words: `29.1 to 30.4`, as the page writes numbers (`text`)."""
    if ends is None or not callable(text):
        return numbers.NOTHING
    return f"{text(ends[0])} … {text(ends[1])}"


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def verdict_box(
    records: Sequence[ResultRecord], note: str = "", language: str | None = None
) -> str:
    """What can be said of the records; `note` stands beside the heading."""
    lines = verdict.sentences(records, language)
    return render("verdict.html", language, lines=lines, note=note)


@dataclass(frozen=True)
class Column:
    """One variant's answer to one prompt: a finished record, or the text so far."""

    variant: str
    state: str
    record: ResultRecord | None = None
    text: str = ""
    note: str = ""


@dataclass(frozen=True)
class Block:
    """One prompt and everybody's answer to it; `index` is the prompt's place in its run."""

    run_id: str
    prompt: str
    index: int
    columns: tuple[Column, ...]
    note: str = ""
    extra: dict[str, object] = field(default_factory=dict)


def answers(blocks: Sequence[Block], language: str | None = None) -> str:
    """Prompts with the variants' answers side by side, the original first."""
    say = words(language)
    shown = []
    for block in blocks:
        columns = sorted(block.columns, key=_original_last, reverse=True)
        reference = _reference_pieces(columns, block.index)
        shown.append(
            {
                "run_id": block.run_id,
                "prompt": block.prompt,
                "note": block.note,
                "columns": [_column(c, block.index, reference, say) for c in columns],
            }
        )
    return render("answers.html", language, blocks=shown)


def _original_last(column: Column) -> bool:
    return palette.style(column.variant.partition(":")[0]).reference


def _output(column: Column, index: int) -> Generation | None:
    record = column.record
    if record is None or record.status != "finished" or index >= len(record.outputs):
        return None
    return record.outputs[index]


def _reference_pieces(columns: Sequence[Column], index: int) -> tuple[str, ...]:
    for column in columns:
        if _original_last(column):
            output = _output(column, index)
            return output.pieces if output else ()
    return ()


def _column(
    column: Column, index: int, reference: tuple[str, ...], say: Words
) -> dict[str, object]:
    output = _output(column, index)
    record = column.record
    values: dict[str, object] = {
        "variant": column.variant,
        "method": column.variant.partition(":")[0],
        "label": palette.variant_label(column.variant),
        "state": column.state,
        "note": column.note,
        "facts": [],
        "share": None,
        "share_label": "",
        "error": None,
        "hint": None,
        "pieces": [{"kind": "shared", "text": column.text.lstrip(" "), "tip": ""}],
    }
    if record is not None and record.status == "failed":
        values |= {"error": reason(record, say), "hint": record.hint}
    if output is None:
        return values
    total = len(output.tokens)
    same = total if output.first_divergence is None else output.first_divergence
    facts = []
    if record is not None and record.decode_tokens_per_second is not None:
        facts.append(say("answer_speed", speed=numbers.speed(record.decode_tokens_per_second)))
    if _original_last(column):
        facts.append(say("answer_tokens", total=total))
    elif reference:
        fact = say("answer_same", total=total) if same == total else ""
        facts.append(fact or say("answer_shared", same=same, total=total))
        values["share"] = round(100 * same / total) if total else 100
        values["share_label"] = facts[-1]
    return values | {"facts": facts, "pieces": pieces(output, reference, say)}


def pieces(output: Generation, reference: Sequence[str], say: Words) -> list[dict[str, str]]:
    """The answer cut where it leaves the original: shared text, first other token, the rest."""
    first = output.first_divergence
    if first is None or not output.pieces:
        return [{"kind": "shared", "text": output.text.lstrip(" "), "tip": ""}]
    tip = (
        say("answer_first", token=first + 1, original=visible(reference[first]))
        if first < len(reference)
        else say("answer_first_end", token=first + 1)
    )
    cut = [{"kind": "shared", "text": "".join(output.pieces[:first]), "tip": ""}]
    if first < len(output.pieces):
        after = first + 1
        while after < len(output.pieces) and not "".join(output.pieces[first:after]):
            after += 1  # A letter of several tokens shows with its last one.
        ringed = _visible_break("".join(output.pieces[first:after]))
        word = ringed.lstrip(" ")
        cut[0]["text"] += ringed[: len(ringed) - len(word)]  # The ring is around the word alone.
        cut.append({"kind": "first", "text": word, "tip": tip})
        cut.append({"kind": "after", "text": "".join(output.pieces[after:]), "tip": ""})
    else:  # It stopped where the original went on.
        cut.append({"kind": "first", "text": "∎", "tip": tip})
    cut[0]["text"] = cut[0]["text"].lstrip(" ")
    return cut


def visible(piece: str) -> str:
    """A token as a person can see it, its white space too."""
    return piece.replace("\n", "⏎").replace(" ", "␣") or "∎"


def _visible_break(piece: str) -> str:
    return piece if piece.strip() else piece.replace("\n", "⏎\n").replace(" ", "␣") or "∎"
