"""Artifacts are whole or absent, and found by what made them."""

from __future__ import annotations

from pathlib import Path

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


def written(directory, *names, config=None, temporary=()):
    """A run into a directory that writes files."""
    artifacts.begin(directory)
    for name in names:
        artifacts.write_json(directory / name, {"by": "a run"})
    artifacts.finish(directory, "fit", config or {"names": names}, temporary=temporary)


def files(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def test_a_directory_holds_what_its_last_run_wrote(tmp_path):
    written(tmp_path / "out", "cells.json", "averages.json", "deep/er/x.json")
    written(tmp_path / "out", "cells.json", "samples.json")
    assert files(tmp_path / "out") == ["cells.json", "meta.json", "samples.json"]
    assert artifacts.read_json(tmp_path / "out" / "meta.json")["files"] == ["cells.json", "samples.json"]
    assert not (tmp_path / "out" / "deep").exists()


def test_files_of_other_people_stay(tmp_path):
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "before.txt").write_text("there before any run")
    written(out, "cells.json", "averages.json", "deep/x.json")
    (out / "notes.txt").write_text("mine")
    (out / "deep" / "notes.txt").write_text("mine too")
    written(out, "cells.json")
    assert files(out) == ["before.txt", "cells.json", "deep/notes.txt", "meta.json", "notes.txt"]


def test_what_an_artifact_s_own_list_does_not_hold_stays(tmp_path):
    out = artifacts.begin(tmp_path / "out")
    artifacts.write_json(out / "old.json", {})
    artifacts.finish(out, "fit", {})
    meta = artifacts.read_json(out / "meta.json")
    del meta["files"]  # as versions that kept no list wrote it
    artifacts.write_json(out / "meta.json", meta)
    written(out, "new.json")
    assert files(out) == ["meta.json", "new.json", "old.json"]


def test_a_list_cannot_reach_out_of_its_directory(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "precious.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious.json").write_text("{}")
    written(out, "cells.json")
    (out / "link").symlink_to(tmp_path / "elsewhere")
    names = ["../precious.json", str(tmp_path / "precious.json"), "link/precious.json", "", "."]
    artifacts.write_json(out / "meta.json", artifacts.read_json(out / "meta.json") | {"files": names})
    written(out, "new.json")
    assert (tmp_path / "precious.json").exists() and (tmp_path / "elsewhere" / "precious.json").exists()


def test_a_run_that_was_broken_off_leaves_nothing_for_good(tmp_path):
    out = tmp_path / "out"
    written(out, "first.json")
    artifacts.begin(out)
    artifacts.write_json(out / "second.json", {})
    assert files(out) == [".writing", "first.json", "second.json"]  # killed here: no mark, nothing removed
    artifacts._open.clear()
    written(out, "third.json")
    assert files(out) == ["meta.json", "third.json"]


def test_a_run_that_goes_on_finds_what_it_had(tmp_path):
    out = tmp_path / "out"
    artifacts.begin(out)
    artifacts.write_json(out / "points" / "1.json", {})
    artifacts._open.clear()
    artifacts.begin(out)
    assert (out / "points" / "1.json").is_file()
    artifacts.write_json(out / "points" / "2.json", {})
    artifacts.write_json(out / "all.json", {})
    (out / "points" / "mine.txt").write_text("")
    artifacts.finish(out, "latency", {}, temporary=["points"])
    assert files(out) == ["all.json", "meta.json", "points/mine.txt"]
    assert artifacts.read_json(out / "meta.json")["files"] == ["all.json"]


def test_files_added_to_a_finished_artifact_are_its_own(tmp_path):
    out = tmp_path / "out"
    written(out, "latency.json")
    artifacts.write_json(out / "scaling.json", {})
    artifacts.add_files(out, "scaling.json")
    written(out, "latency.json", config={"another": 1})
    assert files(out) == ["latency.json", "meta.json"]


def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    artifacts.write_lines(path, [{"a": 1}])
    with (
        pytest.raises(UserError, match=r"cannot write .*rows\.jsonl: No space left on device: make room or give"),
        artifacts.replacing(path),
        open("/dev/full", "w") as full,  # noqa: PTH123 - a device
    ):
        full.write("x" * 100_000)
    assert artifacts.read_lines(path) == [{"a": 1}]
    assert files(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("place", ["a-file/deeper", "a-file"])
def test_a_place_that_is_no_directory_is_one_line(tmp_path, place):
    (tmp_path / "a-file").write_text("")
    for refused in (artifacts.begin, artifacts.check_writable):
        with pytest.raises(UserError, match=r"cannot write .*: (Not a directory|File exists): give another place with"):
            refused(tmp_path / place)
    with pytest.raises(UserError, match="cannot write"):
        artifacts.write_json(tmp_path / place / "x.json", {})


def test_a_directory_that_can_be_made_is_fine(tmp_path, monkeypatch):
    artifacts.check_writable(tmp_path / "new" / "newer")
    monkeypatch.chdir(tmp_path)
    artifacts.check_writable(Path("artifacts") / "fit")
    assert not list(tmp_path.iterdir())


def test_the_cache_of_the_user_has_a_setting_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("KVGAUGE_CACHE", str(tmp_path))
    (tmp_path / "a-file").write_text("")
    with pytest.raises(UserError, match="give another place with KVGAUGE_CACHE="):
        artifacts.write_json(tmp_path / "a-file" / "x.json", {})


def test_what_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        artifacts.read_json(tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        artifacts.read_lines(tmp_path)
