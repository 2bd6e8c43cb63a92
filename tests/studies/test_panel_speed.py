from __future__ import annotations

import pytest

import kvgauge
from kvgauge.benchmarks.ruler import Ruler
from kvgauge.prompts.length import TokenCounter
from pipelines.studies.panel_speed import BUDGETS, METHODS, PHASES, compare, fitted_cells


def test_both_ways_give_the_same_answers() -> None:
    model, tokenizer = kvgauge.load_model("tiny/llama")
    cells = fitted_cells(model, tokenizer, sequences=1)
    assert len(cells) == 1 + len(METHODS) * len(BUDGETS)
    ruler = Ruler(tasks=["vt"], lengths=(1536,), samples=1)
    samples = list(ruler.prompts(TokenCounter(tokenizer, chat=True)))
    result = compare(model, tokenizer, samples, cells[:3])
    assert result["cells"] == ["full", "ksvd@0.75", "ksvd@0.5"]
    assert result["identical_answers"] == result["answers"] == 3
    assert result["ratio"] == pytest.approx(result["separate_s"] / result["panel_s"], rel=0.02)
    for shares in result["shares"].values():
        assert tuple(shares) == PHASES
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3)
