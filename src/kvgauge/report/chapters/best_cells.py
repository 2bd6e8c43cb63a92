"""The first chapter: the best cell of every budget, what it costs, and what is not settled."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from kvgauge.evaluation.statistics import format_interval
from kvgauge.report.answers import Answer
from kvgauge.report.chapters.draft import Draft
from kvgauge.report.collect import Measurements
from kvgauge.report.page.blocks import Card, Cards, Item
from kvgauge.report.settings import Setting, settings
from kvgauge.report.tables import format_bytes, format_seconds, timed_cells

Row = dict[str, Any]

CAPTION = (
    "A cell competes at every budget that its measured bytes keep to, within 2%; the best has the highest mean of task "
    "means on these prompts, and of equal ones the fewest bytes. That score flatters it, as it is the best of several. "
    "Not settled: the 95% interval of the paired difference from the best holds zero, not corrected for the number of "
    "cells. The bar is the score's 95% interval, the upright line the uncompressed cache. TTFT and TPOT are times to "
    "the first token and per token, over those of the preallocated uncompressed cache. All numbers are in answers.csv."
)
HALF = 0.6  # below this share of the uncompressed cache's own bytes, the reference holds 16 bits for its 32


def best_cells(draft: Draft, measured: Measurements, found: Sequence[Answer], baseline: str = "full") -> None:
    """A card per budget, one for neighbouring budgets of the same answer: it competes with all cells at the largest.

    Args:
        draft: receives the chapter.
        measured: what the stages measured.
        found: of `kvgauge.report.answers.answers`, not empty.
        baseline: label of the uncompressed cell.
    """
    blocks: list[Cards] = []
    for each in settings(measured.cells, baseline):
        here = [answer for answer in found if (answer.model, answer.compress_at) == (each.model, each.compress_at)]
        full = next((row for row in each.overall if row["cell"] == baseline and row["task"] == "all"), None)
        if here:
            text = _uncompressed(full, measured.latency, each, here[0].samples) if full else ""
            alike = [list(group) for _, group in groupby(here, key=lambda one: (one.cell, one.competitors > 0))]
            cards = [_card(group[0], full, [answer.budget for answer in group[1:]]) for group in alike]
            blocks.append(Cards(each.mark.strip(" ()"), CAPTION, text, cards))
    draft.chapter("Best cells", blocks)


def _uncompressed(full: Row, latency: Sequence[Row], each: Setting, samples: int) -> str:
    """What all is compared with, in a sentence or two."""
    prompts = "prompt" if samples == 1 else "prompts"
    text = (
        f"Uncompressed, the cache holds {format_bytes(full['full_nbytes'])} per prompt and scores "
        f"{format_interval(full['mean'], full['low'], full['high'])}; cells are compared on the {samples:,} {prompts} "
        "that all of them have met."
    )
    if latency:
        for row in timed_cells(latency).to_dict("records"):
            if row["cell"] == full["cell"] and row.get("model", each.model) == each.model:
                text += (
                    f" At {int(row['context_length']):,} tokens and batch {int(row['batch'])} its first token takes "
                    f"{format_seconds(row['ttft_s'])}, each further one {format_seconds(row['tpot_median_s'])}."
                )
    return text


def _card(answer: Answer, full: Row | None, smaller: Sequence[float | None]) -> Card:
    head = "any size" if answer.budget is None else f"at most {answer.budget:g} of the bytes"
    if smaller:
        head += f", and still at {', '.join(f'{budget:g}' for budget in smaller)}"
    if answer.cell is None:
        tried = f"None of {answer.competitors} cells of this size scores above 0."
        return Card(head, verdict=tried if answer.competitors else "No cell is this small.")
    assert answer.score is not None and answer.score_low is not None and answer.score_high is not None
    return Card(
        head=head,
        answer=answer.cell,
        verdict=_verdict(answer),
        names=answer.open,
        score=format_interval(answer.score, answer.score_low, answer.score_high),
        reach=(answer.score_low, answer.score, answer.score_high),
        reference=None if full is None else full["mean"],
        items=[*_loss(answer), _bytes(answer, full), *_times(answer)],
    )


def _verdict(answer: Answer) -> str:
    others = answer.competitors - 1
    if not others:
        return "The only cell of this size."
    if answer.open:
        return f"Not settled against {len(answer.open)} of {others}:"
    return f"Settled: better than {'the other cell' if others == 1 else f'all {others} others'} of this size."


def _loss(answer: Answer) -> list[Item]:
    if answer.diff is None or answer.diff_low is None or answer.diff_high is None:
        return []
    difference = format_interval(answer.diff, answer.diff_low, answer.diff_high)
    if answer.diff_high < 0.0:
        return [Item("against full", difference, "a loss is shown")]
    if answer.diff_low > 0.0:
        return [Item("against full", difference, "a gain is shown")]
    return [Item("against full", difference, f"no loss shown; these prompts show one of {answer.detectable:.2f}")]


def _bytes(answer: Answer, full: Row | None) -> Item:
    assert answer.nbytes is not None and answer.full_nbytes is not None
    notes = [f"{format_bytes(answer.nbytes)} of {format_bytes(answer.full_nbytes)} per prompt"]
    if full is not None and answer.full_nbytes < HALF * full["full_nbytes"]:
        notes[0] += " at 16 bits a number"
    if answer.fixed_nbytes:
        notes.append(f"{format_bytes(answer.fixed_nbytes)} of bases once")
    return Item("bytes held", f"{answer.bytes_ratio:.3f}", ", ".join(notes))


def _times(answer: Answer) -> list[Item]:
    if answer.timed_at is None:
        return [Item("TTFT, TPOT", "not timed")]
    where = f"at {int(answer.timed_at):,} tokens, batch {int(answer.batch or 1)}"
    times = [("TTFT", answer.ttft), ("TPOT", answer.tpot)]
    items = [(name, f"{ratio:.2f} × full") for name, ratio in times if ratio is not None]
    return [Item(name, text, where if place == len(items) else "") for place, (name, text) in enumerate(items, 1)]
