"""What a run says of caches that grow while they answer: bytes, their peak and the budget, in every row."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvgauge
from kvgauge.benchmarks.ruler import Ruler
from kvgauge.evaluation.answering import Answerer
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.decoding import greedy_batch, prefill
from kvgauge.evaluation.engine import Engine, missing, rows
from kvgauge.evaluation.growth import STEPS, Growth
from kvgauge.evaluation.store import AnswerStore
from kvgauge.evaluation.units import Encoder, make_units
from kvgauge.measure.random_prompts import random_tokens
from kvgauge.prompts.samples import Sample

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]
CellMaker = Callable[..., Cell]
SampleMaker = Callable[..., list[Sample]]

WRITTEN = 90
OFTEN = {"every": 32}


class Silent:
    """Watches nothing."""

    def answered(self, cell: Cell, sample: Sample, text: str) -> None:
        """See `kvgauge.evaluation.engine.Watcher`."""


def answered(
    tiny: Tiny, cells: list[Cell], samples: list[Sample], root: Path, batch_size: int = 1, draft_tokens: int = 0
) -> list[dict[str, Any]]:
    encoder, store = Encoder(*tiny, chat=None), AnswerStore(root)
    units = make_units(samples, encoder, batch_size)
    answerer = Answerer(*tiny, draft_tokens)
    answerer.stop = set()  # a random model may stop at any token
    Engine(answerer, encoder, cells, store, Silent()).run(units)
    return rows(units, samples, cells, store, "tiny", Ruler()).samples


@pytest.fixture(scope="module")
def cells(make_cell: CellMaker) -> list[Cell]:
    return [
        make_cell("full"),
        make_cell("kqsvd", budget=0.5),
        make_cell("kqsvd", budget=0.5, sinks=4, while_decoding=OFTEN),
        make_cell("xkv", budget=0.5, group_size=2, while_decoding=OFTEN),
        make_cell("streaming_llm", budget=0.5, start=4, while_decoding=OFTEN),
        make_cell("kvslimmer", budget=0.5, start=4, while_decoding=OFTEN, compress_at="prompt"),
        make_cell("kvpress/knorm", budget=0.5, while_decoding=OFTEN),
    ]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rows_say_how_the_bytes_grew(
    tiny: Tiny, cells: list[Cell], make_samples: SampleMaker, tmp_path: Path, batch_size: int
) -> None:
    found = answered(tiny, cells, make_samples(2, max_new_tokens=WRITTEN), tmp_path, batch_size)
    assert len(found) == 2 * len(cells)
    for row in found:
        points = row["nbytes_written"]
        assert points[0][0] == 0 and points[-1][0] == WRITTEN - 1  # the last token is never read
        assert [tokens for tokens, _ in points] == sorted(tokens for tokens, _ in points)
        assert row["nbytes_end"] == points[-1][1]
        assert row["nbytes_peak"] == max(size for _, size in points)
        assert row["full_nbytes_end"] > row["full_nbytes"]
        if row["cell"].endswith("~32"):
            assert 0.8 < row["budget_overrun"] <= 1.02
            allowed = 0.5 * row["full_nbytes_end"]
            assert (
                row["nbytes_end"] <= 1.02 * allowed + 64 / 100 * row["full_nbytes"]
            )  # less than two periods and a step
        else:
            assert row["budget_overrun"] is None
    growing, once = (next(row for row in found if row["cell"] == name) for name in ("full", "kqsvd@0.5"))
    assert growing["nbytes_peak"] == growing["nbytes_end"] > growing["nbytes"]
    assert once["nbytes_peak"] == once["nbytes_end"] > once["nbytes"]


def test_drafted_and_batched_answers_are_those_one_by_one(
    tiny: Tiny, cells: list[Cell], make_samples: SampleMaker, tmp_path: Path
) -> None:
    samples = make_samples(2, max_new_tokens=WRITTEN)
    plain = answered(tiny, cells, samples, tmp_path / "plain")
    drafted = answered(tiny, cells, samples, tmp_path / "drafted", draft_tokens=8)
    for mine, other in zip(drafted, plain, strict=True):
        if mine["method"] != "kvpress/knorm":  # equal norms of one token at two places: rounding decides
            assert (mine["answer"], mine["nbytes_end"]) == (other["answer"], other["nbytes_end"])


def test_an_interrupted_run_goes_on_with_the_same_answers(
    tiny: Tiny, cells: list[Cell], make_samples: SampleMaker, tmp_path: Path
) -> None:
    samples = make_samples(2, max_new_tokens=40)
    whole = answered(tiny, cells, samples, tmp_path / "whole")
    store, encoder = AnswerStore(tmp_path / "parts"), Encoder(*tiny, chat=None)
    units = make_units(samples, encoder)
    answered(tiny, cells[:3], samples[:1], tmp_path / "parts")
    assert [cell.label for cell in missing(units[0], cells, store)] == [cell.label for cell in cells[3:]]
    assert answered(tiny, cells, samples, tmp_path / "parts") == whole


def test_a_conversation_goes_on_compressing(tiny: Tiny, make_cell: CellMaker, make_samples: SampleMaker) -> None:
    cell = make_cell("xkv", budget=0.5, group_size=2, while_decoding=OFTEN)
    sample = make_samples(1, max_new_tokens=WRITTEN)[0]
    encoder = Encoder(*tiny, chat=None)
    [unit] = make_units([sample, sample], encoder, turns=2)
    batch, _ = encoder.batch(unit)
    answerer = Answerer(*tiny)
    answerer.stop = set()
    [[first, second]] = answerer.answer(cell, batch, None)
    for answer in (first, second):
        assert answer.budget_overrun is not None and answer.budget_overrun <= 1.02
    assert second.nbytes_written[0][0] == 0 and second.full_nbytes_end > first.full_nbytes_end + first.full_nbytes // 2


def test_a_budget_that_is_not_kept_while_decoding_ends_in_one_line(
    tiny: Tiny, make_cell: CellMaker, make_samples: SampleMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cell = make_cell("kvpress/knorm", budget=0.5, while_decoding=OFTEN)
    monkeypatch.setattr(type(cell.method), "_kept_while_decoding", 0.75)
    with pytest.raises(kvgauge.UserError, match=r"knorm@0\.5~32 holds 1\.\d+ of the bytes of its budget") as caught:
        answered(tiny, [cell], make_samples(1, max_new_tokens=WRITTEN), tmp_path)
    assert "\n" not in str(caught.value)


def test_times_of_the_beginning_and_of_the_end(tiny: Tiny) -> None:
    model, _ = tiny
    cache = kvgauge.build_method("full").new_cache(model)
    logits = prefill(model, random_tokens(1, 20), cache)
    ticks = iter(range(10_000))
    growth = Growth(cache, lambda: float(next(ticks)) ** 2)  # every look at this clock takes longer than the one before
    greedy_batch(model, logits, cache, [2 * STEPS], (), watch=growth)
    assert growth.seconds() == {}  # one pass fewer than tokens
    greedy_batch(model, logits, cache, [2 * STEPS + 1], (), watch=growth)
    looked = [4.0 * step + 1.0 for step in range(4 * STEPS - 1)]  # when a pass ends, and again when it has been noted
    assert growth.steps == looked
    medians = {"step_at_start": statistics.median(looked[:STEPS]), "step_at_end": statistics.median(looked[-STEPS:])}
    assert growth.seconds() == medians and medians["step_at_start"] < medians["step_at_end"]
