from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvgauge
from kvgauge import configuration
from kvgauge.errors import UserError
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.panel import PANELS, cells, settings

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def config(panel: Any, compress_at: str = "context", artifacts: str = "nowhere") -> DictConfig:
    method = configuration.read("method", "ksvd") | {"budget": 0.5}
    corpus = configuration.read("corpus", "essays")
    node = {"panel": panel, "method": method, "budgets": None, "compress_at": compress_at}
    node |= {"artifacts": artifacts, "corpus": corpus}
    return OmegaConf.create(node)


def test_no_panel_is_the_one_method() -> None:
    [setting] = settings(config(None, "prompt"))
    assert (setting.method.label, setting.compress_at) == ("ksvd@0.5", "prompt")


def test_a_list_of_cells() -> None:
    panel = [{"method": "full"}, {"method": "ksvd", "budget": 0.25, "compress_at": "prompt"}]
    found = settings(config(panel))
    assert [(each.method.label, each.compress_at) for each in found] == [("full", "context"), ("ksvd@0.25", "prompt")]


@pytest.mark.parametrize("name", configuration.names(PANELS))
def test_every_saved_panel_can_be_built(name: str) -> None:
    found = settings(config(name))
    assert len({setting.method.label for setting in found}) == len(found) > 1


@pytest.mark.parametrize(
    ("panel", "message"),
    [
        ([], "panel is empty"),
        ("paretto", "did you mean 'pareto'"),
        ([{"budget": 0.5}], "needs a method"),
        (["ksvd"], "needs a method"),
        ({"method": "ksvd"}, "list of cells"),
        ([{"method": "ksvdd"}], "did you mean 'ksvd'"),
        ([{"method": "ksvd", "bugdet": 0.5}], "did you mean 'budget'"),
        ([{"method": "ksvd", "budget": 1.5}], "outside"),
        ([{"method": "full", "compress_at": "contxt"}], "did you mean 'context'"),
    ],
)
def test_bad_panels_end_in_one_line(panel: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        settings(config(panel))
    assert "\n" not in str(error.value)


def test_two_cells_with_one_fingerprint_are_refused(tiny: Tiny) -> None:
    cfg = config([{"method": "full"}, {"method": "full"}])
    with pytest.raises(UserError, match="full twice"):
        cells(cfg, *tiny, settings(cfg))


def test_two_cells_with_one_name_are_refused(tiny: Tiny) -> None:
    cfg = config([{"method": "full"}, {"method": "full", "reserve": 512}])
    with pytest.raises(UserError, match="are called full"):
        cells(cfg, *tiny, settings(cfg))


def test_the_moment_of_compression_tells_cells_apart(tiny: Tiny) -> None:
    cfg = config([{"method": "full"}, {"method": "full", "compress_at": "prompt"}])
    first, second = cells(cfg, *tiny, settings(cfg))
    assert first.fingerprint != second.fingerprint


def test_missing_projections_name_the_command(tiny: Tiny, tmp_path: Path) -> None:
    cfg = config(None, artifacts=str(tmp_path))
    with pytest.raises(UserError, match=r"kvgauge fit method=ksvd"):
        cells(cfg, *tiny, settings(cfg))


def test_an_overridden_budget_is_not_reported() -> None:
    assert Cell(kvgauge.build_method("ksvd", budget=0.5), "context").budget == 0.5
    assert Cell(kvgauge.build_method("ksvd", budget=0.5, rank=16), "context").budget is None
    assert Cell(kvgauge.build_method("full"), "context").budget is None
