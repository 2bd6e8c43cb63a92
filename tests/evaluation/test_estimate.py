from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvgauge
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.estimate import CellState, Speed, describe, estimate, probe, states
from kvgauge.evaluation.store import AnswerStore
from kvgauge.evaluation.units import Encoder, make_units
from kvgauge.prompts.samples import Sample

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]
CellMaker = Callable[..., Cell]
SampleMaker = Callable[..., list[Sample]]
SPEED = Speed(flops=1e9, bandwidth=1e8)


def test_states_count_what_is_stored(
    tiny: Tiny, make_cell: CellMaker, make_samples: SampleMaker, tmp_path: Path
) -> None:
    units, store = make_units(make_samples(3), Encoder(*tiny, chat=None)), AnswerStore(tmp_path)
    cells = [make_cell("full"), make_cell("ksvd", budget=0.5)]
    store.put(cells[1].fingerprint, units[2].keys[0], {})
    assert states(units, cells, store) == [CellState(cells[0], 0, 3), CellState(cells[1], 1, 3)]


def test_a_shared_prefill_is_counted_once(
    tiny: Tiny, make_cell: CellMaker, make_samples: SampleMaker, tmp_path: Path
) -> None:
    encoder, store = Encoder(*tiny, chat=None), AnswerStore(tmp_path)
    units = make_units(make_samples(2), encoder)
    one, two = [make_cell("full")], [make_cell("full"), make_cell("full", compress_at="prompt")]
    first, second = (estimate(tiny[0], encoder, units, cells, store, SPEED) for cells in (one, two))
    assert second.prefill == first.prefill > 0
    assert second.decode == pytest.approx(2 * first.decode)
    halved = estimate(tiny[0], encoder, units, two, store, SPEED, processes=2)
    assert halved.seconds == pytest.approx(second.seconds / 2)


def test_memory_covers_model_and_both_caches(
    tiny: Tiny, make_cell: CellMaker, make_samples: SampleMaker, tmp_path: Path
) -> None:
    encoder, store = Encoder(*tiny, chat=None), AnswerStore(tmp_path)
    samples = make_samples(2)
    units = make_units(samples, encoder)
    left = estimate(tiny[0], encoder, units, [make_cell("ksvd", budget=0.5)], store, SPEED)
    longest = max(encoder.prompt(sample)[0].tokens for sample in samples)
    assert left.weights == sum(parameter.numel() * 4 for parameter in tiny[0].parameters())
    assert left.exact == kvgauge.full_nbytes(tiny[0], longest)
    assert left.compressed == left.exact // 2
    assert left.nbytes > left.weights + left.exact + left.compressed


def test_the_probe_measures_something(tiny: Tiny) -> None:
    speed = probe(tiny[0])
    assert speed.flops > 0 and speed.bandwidth > 0


def test_the_text_names_every_cell(tiny: Tiny, make_cell: CellMaker, make_samples: SampleMaker, tmp_path: Path) -> None:
    encoder, store, cells = Encoder(*tiny, chat=None), AnswerStore(tmp_path), [make_cell("full"), make_cell("ksvd")]
    units = make_units(make_samples(1), encoder)
    known = states(units, cells, store)
    text = describe(known, estimate(tiny[0], encoder, units, cells, store, SPEED))
    assert all(cell.label in text and cell.fingerprint in text for cell in cells)
    assert "time: about" in text and "memory: about" in text
    assert describe(known, None).endswith("nothing is left to compute")
