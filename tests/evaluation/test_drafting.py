"""Drafted decoding gives the greedy answer and leaves the same cache behind, whatever the drafts are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvgauge
from kvgauge.benchmarks.ruler import Ruler
from kvgauge.contract.fitting import learns
from kvgauge.evaluation.answering import Answerer
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.decoding import greedy, prefill
from kvgauge.evaluation.drafting import Drafts, greedy_drafted
from kvgauge.evaluation.engine import Engine, rows
from kvgauge.evaluation.run import draft_tokens
from kvgauge.evaluation.store import AnswerStore
from kvgauge.evaluation.units import Encoder, make_units
from kvgauge.layers.cache import KVCache
from kvgauge.prompts.samples import Sample

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]
CellMaker = Callable[..., Cell]
SampleMaker = Callable[..., list[Sample]]

NEW = 150  # tokens: more than two growth steps of the buffers, and than a window or a fold lasts


def test_what_is_proposed() -> None:
    drafts = Drafts(3, prompt=[9, 8, 7, 6, 5], answers=[[1, 2, 3, 4, 5, 6], [1, 2, 8]])
    assert drafts.propose([1, 2], 9) == [8]  # the latest answer that begins alike
    assert drafts.propose([1, 2, 3], 9) == [4, 5, 6]
    assert drafts.propose([1, 2, 3], 2) == [4, 5]
    assert drafts.propose([0, 2, 3], 9) == [4, 5, 6]  # the last two tokens, in another answer
    assert drafts.propose([0, 8, 7], 9) == [6, 5]  # in the prompt
    assert drafts.propose([3, 3, 1, 3, 3], 9) == [1, 3, 3]  # in the answer itself
    assert drafts.propose([0, 6, 5], 9) == []  # nothing follows there
    assert drafts.propose([1, 2], 0) == []
    assert Drafts(0, prompt=[1, 2, 3]).propose([1, 2], 9) == []


def compressed(model: PreTrainedModel, cell: Cell) -> tuple[KVCache, torch.Tensor]:
    cache = cell.method.new_cache(model, cell.fitted)
    ids = torch.randint(3, 259, (1, 150), generator=torch.Generator().manual_seed(1))
    cache.expect(120)
    prefill(model, ids[:, :120], cache)
    cache.compress()
    return cache, prefill(model, ids[:, 120:], cache)


CELLS: list[tuple[str, dict[str, Any], bool]] = [
    ("full", {}, True),
    ("kqsvd", {"budget": 0.5}, True),
    ("kqsvd", {"budget": 0.75, "sinks": 4, "window": 16}, True),
    ("xkv", {"budget": 0.5, "group_size": 2}, True),
    ("xkv", {"budget": 0.5, "group_size": 2, "rope": "post", "fold_every": 16, "sinks": 2}, True),
    ("xkv", {"budget": 0.5, "group_size": 2, "sr": {"chunk": 8, "budget": 32}}, False),
    ("minicache", {}, True),
    ("compose", {"compose": [{"method": "kqsvd", "sinks": 4, "window": 16}, "int4"], "budget": 0.25}, True),
    ("compose", {"compose": [{"method": "xkv", "group_size": 2}, "int8"], "budget": 0.25}, True),
    ("compose", {"compose": ["full", "int4"], "budget": None}, True),
    ("kvpress/snapkv", {"budget": 0.5}, True),
    ("kvpress/adakv", {"compression_ratio": 0.5}, True),
    ("streaming_llm", {"budget": 0.5, "window": 32, "start": 4}, False),
    ("kvslimmer", {"budget": 0.5, "window": 32, "start": 4}, False),
]


@pytest.mark.parametrize(("name", "options", "drafted"), CELLS, ids=lambda value: str(value)[:40])
def test_the_greedy_answer_and_the_same_cache(
    tiny: Tiny, make_cell: CellMaker, name: str, options: dict[str, Any], drafted: bool
) -> None:
    model, _ = tiny
    cell = make_cell(name, **options)
    cache, logits = compressed(model, cell)
    wanted = greedy(model, logits, cache, NEW, ())
    wrong = [token if index % 9 else token ^ 1 for index, token in enumerate(wanted, start=1)]

    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    for answers in ([wanted], [wrong], []):
        mine, logits = compressed(model, cell)
        passes = 0
        handle = model.register_forward_hook(count)
        try:
            got = greedy_drafted(model, logits, mine, NEW, (), Drafts(12, answers=list(answers)))
        finally:
            handle.remove()
        assert got == wanted
        assert mine.get_seq_length() == cache.get_seq_length()
        assert mine.nbytes_by_part() == cache.nbytes_by_part()
        if answers:
            assert (passes < NEW / 2) == drafted
    following = torch.full((1, 1), 5)
    torch.testing.assert_close(prefill(model, following, mine), prefill(model, following, cache), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), [("full", {}), ("kqsvd", {"budget": 0.6}), ("xkv", {"budget": 0.6})])
def test_latents_of_mla(name: str, options: dict[str, Any]) -> None:
    model, _ = kvgauge.load_model("tiny/deepseek_v2")
    ids = torch.randint(3, 259, (2, 128), generator=torch.Generator().manual_seed(0))
    method = kvgauge.build_method(name, **options)
    fitted = method.fit(kvgauge.collect(model, [ids]), model) if learns(method) else None
    cell = Cell(method, "context", fitted)
    cache, logits = compressed(model, cell)
    wanted = greedy(model, logits, cache, NEW, ())
    wrong = [token if index % 9 else token ^ 1 for index, token in enumerate(wanted, start=1)]
    mine, logits = compressed(model, cell)
    assert greedy_drafted(model, logits, mine, NEW, (), Drafts(12, answers=[wrong])) == wanted
    assert mine.nbytes_by_part() == cache.nbytes_by_part()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_tokens": -1, "batch_size": 1, "turns": 1}, "draft_tokens is -1"),
        ({"draft_tokens": 8, "batch_size": 4, "turns": 1}, "one prompt at a time"),
        ({"draft_tokens": 8, "batch_size": 1, "turns": 3}, "one prompt at a time"),
    ],
)
def test_bad_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(kvgauge.UserError, match=message):
        draft_tokens(OmegaConf.create(options))


def test_a_stop_token_ends_a_drafted_answer(tiny: Tiny, make_cell: CellMaker) -> None:
    model, _ = tiny
    cell = make_cell("full")
    cache, logits = compressed(model, cell)
    free = greedy(model, logits, cache, 12, ())
    stop = (free[7],)
    cache, logits = compressed(model, cell)
    wanted = greedy(model, logits, cache, 12, stop)
    mine, logits = compressed(model, cell)
    assert greedy_drafted(model, logits, mine, 12, stop, Drafts(20, answers=[free])) == wanted
    assert mine.get_seq_length() == cache.get_seq_length()


def test_a_panel_with_drafts_gives_the_rows_of_one_without(
    tiny: Tiny, make_cell: CellMaker, make_samples: SampleMaker, tmp_path: Path
) -> None:
    samples = make_samples(3, words=150, max_new_tokens=40)
    cells = [make_cell("full"), make_cell("kqsvd", budget=0.75), make_cell("xkv", budget=0.75, group_size=2)]
    encoder = Encoder(*tiny, chat=None)
    units = make_units(samples, encoder)
    found = []
    for tokens in (0, 8):
        store = AnswerStore(tmp_path / str(tokens))

        class Silent:
            def answered(self, cell: Cell, sample: Sample, text: str) -> None:
                pass

        Engine(Answerer(*tiny, tokens), encoder, cells, store, Silent()).run(units)
        found.append(rows(units, samples, cells, store, "tiny/llama", Ruler()).samples)
    assert found[0] == found[1]
