"""The engine with every method there is: the same answers in a panel, alone, and in a padded batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvgauge
from kvgauge.benchmarks.ruler import Ruler
from kvgauge.evaluation.answering import Answerer
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.engine import Engine, rows
from kvgauge.evaluation.store import AnswerStore
from kvgauge.evaluation.units import Encoder, make_units
from kvgauge.prompts.samples import Sample

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]
CellMaker = Callable[..., Cell]
SampleMaker = Callable[..., list[Sample]]
BUDGET = 0.8  # within the reach of every method on four layers
Row = dict[str, Any]


class Silent:
    def answered(self, cell: Cell, sample: Sample, text: str) -> None:
        pass


def cell_of(make_cell: CellMaker, name: str, compress_at: str) -> Cell:
    return make_cell(name, compress_at, **({} if name == "full" else {"budget": BUDGET}))


def answers(
    tiny: Tiny, cells: Sequence[Cell], samples: Sequence[Sample], store: Path, batch_size: int = 1
) -> list[Row]:
    encoder = Encoder(*tiny, chat=None)
    units = make_units(samples, encoder, batch_size=batch_size)
    Engine(Answerer(*tiny), encoder, cells, AnswerStore(store), Silent()).run(units)
    return rows(units, samples, cells, AnswerStore(store), "tiny/llama", Ruler()).samples


@pytest.fixture(scope="module")
def samples(make_samples: SampleMaker) -> list[Sample]:
    return make_samples(3, words=150)


@pytest.fixture(scope="module")
def panel(
    tiny: Tiny, make_cell: CellMaker, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[Row]]:
    """The rows of one panel of all methods at both moments, by method and moment."""
    names, moments = kvgauge.list_methods(), ("context", "prompt")
    cells = [cell_of(make_cell, name, compress_at) for name in names for compress_at in moments]
    found = answers(tiny, cells, samples, tmp_path_factory.mktemp("panel"))
    return {
        (cell.method.name, cell.compress_at): found[index * len(samples) : (index + 1) * len(samples)]
        for index, cell in enumerate(cells)
    }


@pytest.mark.parametrize("compress_at", ["context", "prompt"])
@pytest.mark.parametrize("name", kvgauge.list_methods())
def test_alone_and_in_a_batch(
    tiny: Tiny,
    make_cell: CellMaker,
    samples: list[Sample],
    panel: dict[tuple[str, str], list[Row]],
    tmp_path: Path,
    name: str,
    compress_at: str,
) -> None:
    cell, expected = cell_of(make_cell, name, compress_at), panel[name, compress_at]
    assert answers(tiny, [cell], samples, tmp_path / "alone") == expected
    batched = answers(tiny, [cell], samples, tmp_path / "batch", batch_size=3)
    assert [row["answer"] for row in batched] == [row["answer"] for row in expected]
    for row in [*expected, *batched]:
        assert row["compressed_tokens"] == row["context_tokens"]
        assert row["nbytes"] <= 1.02 * (row["budget"] or 1.0) * row["full_nbytes"]
