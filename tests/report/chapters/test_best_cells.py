"""The cards of the best cells say no more than the answers know."""

from __future__ import annotations

from typing import Any

import pytest

from kvgauge.report.answers import Answer
from kvgauge.report.chapters import Draft, best_cells
from kvgauge.report.collect import Measurements
from kvgauge.report.page import Card, Cards

Row = dict[str, Any]

FULL = {"cell": "full", "method": "full", "budget": None, "model": "m", "compress_at": "context", "task": "all"}
FULL |= {"length": 1024, "mean": 0.75, "low": 0.6, "high": 0.9, "nbytes": 4096.0, "full_nbytes": 4096.0}
BEST = FULL | {"cell": "xkv@0.5", "method": "xkv", "budget": 0.5}
ANSWER: Row = {"model": "m", "compress_at": "context", "budget": 0.5, "cell": "xkv@0.5", "samples": 20}
ANSWER |= {"competitors": 3, "score": 0.7, "score_low": 0.5, "score_high": 0.8, "beaten": 2, "bytes_ratio": 0.5}
ANSWER |= {"diff": -0.05, "diff_low": -0.2, "diff_high": 0.1, "detectable": 0.21, "nbytes": 2048.0}
ANSWER |= {"full_nbytes": 4096.0, "fixed_nbytes": 1024}


def block(*answers: Answer, latency: list[Row] | None = None) -> Cards:
    draft = Draft()
    best_cells(draft, Measurements(cells=[FULL, BEST], latency=latency or []), answers)
    [chapter] = draft.sections
    [found] = chapter.blocks
    assert isinstance(found, Cards)
    return found


def card(**changes: Any) -> Card:
    [found] = block(Answer(**ANSWER | changes)).cards
    return found


def items(found: Card) -> dict[str, tuple[str, str]]:
    return {item.name: (item.value, item.note) for item in found.items}


def test_a_card_has_the_score_the_bytes_and_what_is_open() -> None:
    found = card(open=("ksvd@0.5",), beaten=1)
    assert (found.head, found.answer, found.score) == ("at most 0.5 of the bytes", "xkv@0.5", "0.70 [0.50, 0.80]")
    assert (found.reach, found.reference) == ((0.5, 0.7, 0.8), 0.75)
    assert (found.verdict, found.names) == ("Not settled against 1 of 2:", ("ksvd@0.5",))
    assert items(found)["bytes held"] == ("0.500", "2 KiB of 4 KiB per prompt, 1 KiB of bases once")
    assert items(found)["TTFT, TPOT"] == ("not timed", "")


def test_neighbouring_budgets_of_one_answer_share_a_card() -> None:
    smaller = ANSWER | {"budget": 0.375, "competitors": 1}
    least = ANSWER | {"budget": 0.25, "cell": None, "competitors": 1}
    nothing = ANSWER | {"budget": 0.125, "cell": None, "competitors": 0}
    found = block(*(Answer(**row) for row in (ANSWER, smaller, least, nothing))).cards
    assert [one.head for one in found] == [
        "at most 0.5 of the bytes, and still at 0.375",
        "at most 0.25 of the bytes",
        "at most 0.125 of the bytes",
    ]
    assert found[0].verdict == "Settled: better than all 2 others of this size."


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "Settled: better than all 2 others of this size."),
        ({"competitors": 2, "beaten": 1}, "Settled: better than the other cell of this size."),
        ({"competitors": 1, "beaten": 0}, "The only cell of this size."),
        ({"cell": None, "score": None}, "None of 3 cells of this size scores above 0."),
        ({"cell": None, "competitors": 0}, "No cell is this small."),
    ],
)
def test_verdicts(changes: Row, verdict: str) -> None:
    found = card(**changes)
    assert (found.verdict, list(found.names)) == (verdict, [])
    assert bool(found.answer) == ("cell" not in changes)


@pytest.mark.parametrize(
    ("low", "high", "note"),
    [
        (-0.2, 0.1, "no loss shown; these prompts show one of 0.21"),
        (-0.2, -0.1, "a loss is shown"),
        (0.1, 0.2, "a gain is shown"),
    ],
)
def test_a_loss_is_said_only_where_it_is_shown(low: float, high: float, note: str) -> None:
    assert items(card(diff_low=low, diff_high=high))["against full"][1] == note


def test_times_are_ratios_to_the_uncompressed_cache_at_a_place() -> None:
    found = items(card(timed_at=4096, batch=1, ttft=1.1, tpot=0.61))
    assert found["TTFT"] == ("1.10 × full", "")
    assert found["TPOT"] == ("0.61 × full", "at 4,096 tokens, batch 1")


def test_bytes_against_a_reference_of_fewer_bits_say_so() -> None:
    assert items(card(full_nbytes=2048.0, nbytes=1024.0))["bytes held"][1].startswith(
        "1 KiB of 2 KiB per prompt at 16 bits a number"
    )


def test_the_uncompressed_cache_is_described_above_the_cards() -> None:
    times = {"cell": "full", "method": "full", "budget": None, "model": "m", "batch": 1, "context_length": 4096}
    times |= {"ttft_s": 1.5, "tpot_median_s": 0.02, "tpot_p95_s": 0.03, "tokens_per_s": 50.0, "nbytes": 1}
    times |= {"peak_bytes": None, "tpot_over_static": 1.0, "tpot_over_dynamic": 0.9, "ttft_over_static": 1.0}
    text = block(Answer(**ANSWER), latency=[times]).text
    for said in ("4 KiB per prompt", "0.75 [0.60, 0.90]", "20 prompts", "4,096 tokens and batch 1", "1.5 s", "20 ms"):
        assert said in text
    assert "first token" not in block(Answer(**ANSWER)).text
