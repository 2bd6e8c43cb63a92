"""The report as a whole: complete, the same every time, and without what was not measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvgauge.errors import UserError
from kvgauge.report import build_report
from kvgauge.report.build import metrics
from kvgauge.report.plots import heatmap, to_png

PROVENANCE = {"config": {"method": "kqsvd"}, "config_hash": "0f1e", "git_revision": "deadbeef", "libraries": {}}


def test_report_is_complete_and_the_same_every_time(stages: dict[str, list[Path]], tmp_path: Path) -> None:
    picture = tmp_path / "alike.png"
    picture.write_bytes(to_png(heatmap([[1.0, 0.5], [0.5, 1.0]], "likeness")))
    figures = [("Likeness of layers", "between neighbours", picture)]
    first = build_report(**stages, out_dir=tmp_path / "one", provenance=PROVENANCE, extra_figures=figures)
    build_report(**stages, out_dir=tmp_path / "two", provenance=PROVENANCE, extra_figures=figures)
    assert first == tmp_path / "one" / "index.html"
    files = {path.name: path.read_bytes() for path in first.parent.iterdir()}
    assert {"index.html", "table.csv", "table.md", "metrics.json"} <= set(files)
    assert {"pareto.png", "pareto-by-task.png", "differences.png", "bytes-by-part.png"} <= set(files)
    assert {"divergence.png", "error-by-layer.png", "error-by-rank.png", "latency.png"} <= set(files)
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}

    page = files["index.html"].decode()
    for said in ("deadbeef", "0f1e", "Fidelity", "Latency and memory", "Likeness of layers", "kqsvd@0.25"):
        assert said in page
    samples = [json.loads(line) for line in (stages["evaluate_dirs"][0] / "samples.jsonl").read_text().splitlines()]
    scores = [row["score"] for row in samples if row["cell"] == "kqsvd@0.5" and row["task"] == "vt"]
    table = pd.read_csv(tmp_path / "one" / "table.csv").set_index("cell")
    assert table.loc["kqsvd@0.5", "vt"] == pytest.approx(sum(scores) / 6)
    assert json.loads(files["metrics.json"])["kqsvd@0.5.vt"] == pytest.approx(sum(scores) / 6)


def test_the_page_answers_first(stages: dict[str, list[Path]], tmp_path: Path) -> None:
    index = build_report(**stages, out_dir=tmp_path / "out", provenance=PROVENANCE)
    page = index.read_text()
    chapters = re.findall(r'<section id="([\w-]+)">', page)
    assert chapters[:3] == ["best-cells", "score-against-cost", "accuracy-and-bytes"]
    assert chapters[-1] == "provenance"
    answers = pd.read_csv(index.parent / "answers.csv")
    assert answers["budget"].tolist() == [0.5, 0.25]
    table = pd.read_csv(index.parent / "table.csv").set_index("cell")
    shown = re.findall(r'<p class="answer">(.*?)</p>', page)
    assert shown == answers["cell"].tolist()
    for answer in answers.itertuples():
        rivals = table[(table.index != "full") & (table["bytes_ratio"] <= 1.02 * answer.budget)]
        assert answer.score == rivals["all"].max() == table.loc[answer.cell, "all"]
        assert answer.tpot == table.loc[answer.cell, "tpot_over_static"]


def test_the_page_s_figures_hold_the_report_s_numbers(stages: dict[str, list[Path]], tmp_path: Path) -> None:
    index = build_report(**stages, out_dir=tmp_path / "out", provenance=PROVENANCE)
    table = pd.read_csv(index.parent / "table.csv").set_index("cell")
    specs = [
        json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', index.read_text())
    ]
    assert len(specs) == 2
    for spec in specs:
        [drawn] = [data["values"] for data in spec["data"] if data["name"] == "cells"]
        assert {row["cell"] for row in drawn} == set(table.index)
        for row in drawn:
            figures = table.loc[row["cell"], ["all", "all_low", "all_high", "bytes_ratio", "tpot_over_static"]]
            assert figures.tolist() == [row[name] for name in ("mean", "low", "high", "bytes_ratio", "tpot")]


def test_latency_alone_makes_a_report_of_latency(stages: dict[str, list[Path]], tmp_path: Path) -> None:
    index = build_report([], [], stages["latency_dirs"], tmp_path / "out", PROVENANCE)
    page = index.read_text()
    assert "Latency and memory" in page
    assert "Fidelity" not in page
    assert "Accuracy" not in page
    assert json.loads((index.parent / "metrics.json").read_text()) == {}
    assert len(pd.read_csv(index.parent / "table.csv")) == 10


def test_models_lengths_and_moments_each_have_their_figures(
    tmp_path: Path,
    make_samples: Callable[..., list[dict[str, Any]]],
    write_evaluate: Callable[[Path, list[dict[str, Any]]], Path],
) -> None:
    samples = make_samples(("kqsvd",), (0.5,), (512, 1024), 2)
    prompt = [row | {"compress_at": "prompt"} for row in samples if row["method"] != "full"]
    other = [row | {"model": "other"} for row in samples]
    directory = write_evaluate(tmp_path / "evaluate", samples + prompt + other)
    index = build_report([directory], [], [], tmp_path / "out", {})
    names = {path.name for path in index.parent.glob("pareto-*.png") if "by-task" not in path.name}
    assert names == {"pareto-smollm2-135m-context.png", "pareto-smollm2-135m-prompt.png", "pareto-other-context.png"}
    assert (index.parent / "accuracy-by-length-other-context.png").exists()
    figures = json.loads((index.parent / "metrics.json").read_text())
    assert {"other.context.full.all", "smollm2-135m.prompt.kqsvd@0.5.vt.512"} <= set(figures)


def test_metrics_are_flat_means() -> None:
    row = {"model": "m", "compress_at": "context", "cell": "ksvd@0.5", "task": "all", "length": 1024, "mean": 0.25}
    assert metrics([row, row | {"task": "vt", "mean": 0.5}]) == {"ksvd@0.5.all": 0.25, "ksvd@0.5.vt": 0.5}


@pytest.mark.parametrize(("content", "complaint"), [(None, "cannot be read"), (b"GIF89a", "is not a PNG")])
def test_extra_figures_must_be_png(
    stages: dict[str, list[Path]], tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    path = tmp_path / "figure.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        build_report([], [], stages["latency_dirs"], tmp_path / "out", {}, [("F", "c", path)])
    assert not (tmp_path / "out").exists()
