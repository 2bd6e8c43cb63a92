"""Artifacts are whole or absent, and found by what made them."""

from __future__ import annotations

import pytest
import torch

from kvgauge import artifacts
from kvgauge.errors import UserError


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    artifacts.write_lines(path, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifacts.write_lines(path, rows())
    assert artifacts.read_lines(path) == [{"a": 1}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_artifact_is_found_by_its_configuration_wherever_it_stands(tmp_path):
    directory = artifacts.begin(tmp_path / "fit" / "any-name")
    with pytest.raises(UserError, match="run `make it` first"):
        artifacts.find(tmp_path, "fit", {"x": 1}, "make it")
    artifacts.finish(directory, "fit", {"x": 1})
    assert artifacts.find(tmp_path, "fit", {"x": 1}, "make it") == directory
    with pytest.raises(UserError, match="any-name differs in x"):
        artifacts.find(tmp_path, "fit", {"x": 2}, "make it")
    artifacts.begin(directory)  # about to change: no longer finished
    with pytest.raises(UserError):
        artifacts.find(tmp_path, "fit", {"x": 1}, "make it")


def test_tensors_and_metadata_survive_and_damage_is_told(tmp_path):
    path = tmp_path / "t.safetensors"
    artifacts.write_tensors(path, {"a": torch.arange(6.0).view(2, 3).T}, {"k": [1, 2]})
    tensors, metadata = artifacts.read_tensors(path)
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3).T)
    assert metadata == {"k": [1, 2]}
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="damaged"):
        artifacts.read_tensors(path)
    with pytest.raises(UserError, match="does not exist"):
        artifacts.read_tensors(tmp_path / "none.safetensors")
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(UserError, match="damaged"):
        artifacts.read_json(tmp_path / "x.json")
