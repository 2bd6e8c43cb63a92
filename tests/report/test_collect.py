"""Stage outputs are read whole, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvgauge.errors import UserError
from kvgauge.report.collect import collect

Row = dict[str, Any]


def refused(**directories: list[Path]) -> str:
    with pytest.raises(UserError) as caught:
        collect(**directories)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_everything_is_read(stages: dict[str, list[Path]]) -> None:
    measured = collect(**stages)
    assert len(measured.samples) == 5 * 5 * 6
    assert {cell["cell"] for cell in measured.cells} >= {"full", "kqsvd@0.5", "streamingllm@0.25"}
    assert len(measured.fidelity) == 2 * 2 * 2 * 2 * 12
    assert len(measured.model) == 2 * 2 * 2
    assert len(measured.latency) == 5 * 2


def test_methods_of_other_directories_are_paired_with_the_uncompressed_run(
    tmp_path: Path, make_samples: Callable[..., list[Row]], write_evaluate: Callable[[Path, list[Row]], Path]
) -> None:
    samples = make_samples(("ksvd", "xkv"), (0.5,), (1024,), 4)
    full = write_evaluate(tmp_path / "full", [row for row in samples if row["method"] == "full"])
    # As a sweep does, the second directory holds the uncompressed run once more.
    both = write_evaluate(tmp_path / "both", [row for row in samples if row["method"] != "ksvd"])
    alone = write_evaluate(tmp_path / "alone", [row for row in samples if row["method"] == "ksvd"])
    measured = collect(evaluate_dirs=[alone, both, full, alone])
    assert len(measured.samples) == len(samples)
    assert all(cell["diff"] is not None for cell in measured.cells if cell["method"] != "full")


def test_differences_survive_where_the_uncompressed_run_is_nowhere(stages: dict[str, list[Path]]) -> None:
    directory = stages["evaluate_dirs"][0]
    written = [row for row in json.loads((directory / "cells.json").read_text()) if row["cell"] != "full"]
    (directory / "cells.json").write_text(json.dumps(written))
    lines = (directory / "samples.jsonl").read_text().splitlines(keepends=True)
    (directory / "samples.jsonl").write_text("".join(line for line in lines if json.loads(line)["cell"] != "full"))
    cells = collect(evaluate_dirs=[directory]).cells
    assert [cell["p_value"] for cell in cells] == [row["p_value"] for row in written]
    assert all(cell["diff"] is not None for cell in cells)


def test_cells_keep_the_bytes_of_their_models_weights(
    tmp_path: Path, make_samples: Callable[..., list[Row]], write_evaluate: Callable[[Path, list[Row]], Path]
) -> None:
    samples = make_samples(("xkv",), (0.5,), (1024,), 4)
    dense = write_evaluate(tmp_path / "dense", samples)
    squeezed = write_evaluate(tmp_path / "squeezed", [row | {"model": "squeezed"} for row in samples])
    written = json.loads((squeezed / "cells.json").read_text())
    (squeezed / "cells.json").write_text(json.dumps([row | {"weights_nbytes": 77} for row in written]))
    cells = collect(evaluate_dirs=[dense, squeezed]).cells
    assert {(cell["model"], cell.get("weights_nbytes")) for cell in cells} == {
        ("smollm2-135m", None),
        ("squeezed", 77),
    }


def test_nothing_is_refused() -> None:
    assert "nothing to report" in refused()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("evaluate_dirs", "samples.jsonl"),
        ("evaluate_dirs", "cells.json"),
        ("merge_dirs", "fidelity.json"),
        ("merge_dirs", "model.json"),
        ("latency_dirs", "latency.json"),
    ],
)
def test_a_missing_or_torn_file_is_named(stages: dict[str, list[Path]], kind: str, name: str) -> None:
    path = stages[kind][0] / name
    path.write_bytes(path.read_bytes()[:-20])
    assert str(path) in refused(**{kind: stages[kind]})
    path.unlink()
    message = refused(**{kind: stages[kind]})
    assert str(path) in message
    assert "does not exist" in message


def test_samples_that_stop_short_of_their_cells_are_refused(stages: dict[str, list[Path]]) -> None:
    path = stages["evaluate_dirs"][0] / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    message = refused(evaluate_dirs=stages["evaluate_dirs"])
    assert "do not belong together" in message
    assert "147 samples against 150" in message


def test_an_empty_samples_file_is_refused(stages: dict[str, list[Path]]) -> None:
    (stages["evaluate_dirs"][0] / "samples.jsonl").write_text("")
    assert "has no samples" in refused(evaluate_dirs=stages["evaluate_dirs"])


def test_a_row_without_a_key_is_named(stages: dict[str, list[Path]]) -> None:
    path = stages["latency_dirs"][0] / "latency.json"
    rows = json.loads(path.read_text())
    del rows[2]["peak_bytes"]
    path.write_text(json.dumps(rows))
    message = refused(latency_dirs=stages["latency_dirs"])
    assert "row 3 of" in message
    assert "peak_bytes" in message


def test_what_is_not_a_list_is_refused(stages: dict[str, list[Path]]) -> None:
    (stages["merge_dirs"][0] / "model.json").write_text('{"kl": 1}')
    assert "not a list" in refused(merge_dirs=stages["merge_dirs"])


def test_contradicting_samples_are_refused(
    tmp_path: Path, make_samples: Callable[..., list[Row]], write_evaluate: Callable[[Path, list[Row]], Path]
) -> None:
    samples = make_samples((), (), (1024,), 2)
    one = write_evaluate(tmp_path / "one", samples)
    other = write_evaluate(tmp_path / "other", [row | {"score": 1 - row["score"]} for row in samples])
    assert "differs" in refused(evaluate_dirs=[one, other])


def test_scores_out_of_range_are_refused(
    tmp_path: Path, make_samples: Callable[..., list[Row]], write_evaluate: Callable[[Path, list[Row]], Path]
) -> None:
    directory = write_evaluate(tmp_path / "one", make_samples((), (), (1024,), 2))
    path = directory / "samples.jsonl"
    path.write_text(path.read_text().replace('"score": 1.0', '"score": 100.0'))
    assert "between 0 and 1" in refused(evaluate_dirs=[directory])
