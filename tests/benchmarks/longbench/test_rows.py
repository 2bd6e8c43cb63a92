import json
import shutil
import zipfile

import pytest
from huggingface_hub import constants

from kvgauge.benchmarks.longbench.rows import Files
from kvgauge.errors import UserError


def write(directory, task, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    (directory / f"{task}.jsonl").write_text(text, encoding="utf-8")


def row(**fields):
    given = {"input": "q", "context": "c", "answers": ["a"], "length": 2, "dataset": "qasper", "language": "en"}
    return given | {"all_classes": None, "_id": "0"} | fields


def test_fields_of_a_row(directory):
    first = Files(str(directory), ["trec"]).rows("trec")[0]
    assert first.input.startswith("Question: Who built Hollin Bridge")
    assert first.answers == ("Individual",)
    assert first.language == "en"
    assert first.all_classes == ("Food", "Date", "City", "Animal", "Individual")
    assert Files(str(directory), ["qasper"]).rows("qasper")[0].all_classes is None


@pytest.mark.parametrize("folder", ["", "data/"])
def test_a_zip_file_and_a_folder_data_are_read_like_a_directory(directory, tmp_path, folder):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(directory / "lcc.jsonl", f"{folder}lcc.jsonl")
    (tmp_path / "plain" / folder).mkdir(parents=True)
    shutil.copy(directory / "lcc.jsonl", tmp_path / "plain" / folder)
    expected = Files(str(directory), ["lcc"]).rows("lcc")
    assert Files(str(tmp_path / "data.zip"), ["lcc"]).rows("lcc") == expected
    assert Files(str(tmp_path / "plain"), ["lcc"]).rows("lcc") == expected


def test_missing_files_are_listed(directory, tmp_path):
    shutil.copy(directory / "qasper.jsonl", tmp_path)
    with pytest.raises(UserError, match=r"missing in .*: trec\.jsonl, lcc\.jsonl: get data\.zip") as error:
        Files(str(tmp_path), ["trec", "qasper", "lcc"])
    assert "qasper" not in str(error.value).split(str(tmp_path))[1]


def test_no_such_source_and_no_zip(tmp_path):
    with pytest.raises(UserError, match="no LongBench source"):
        Files(str(tmp_path / "nowhere"), ["qasper"])
    (tmp_path / "data.zip").write_text("not a zip file")
    with pytest.raises(UserError, match="neither a directory nor a zip file"):
        Files(str(tmp_path / "data.zip"), ["qasper"])


def test_only_line_feeds_part_rows(tmp_path):
    write(tmp_path, "qasper", row(context="one\u2028two\x85three"), "", row(context="four"))
    assert [found.context for found in Files(str(tmp_path), ["qasper"]).rows("qasper")] == [
        "one\u2028two\x85three",
        "four",
    ]


@pytest.mark.parametrize(
    ("task", "bad"),
    [
        ("qasper", "{"),
        ("qasper", "[]"),
        ("qasper", json.dumps({key: value for key, value in row().items() if key != "input"})),
        ("qasper", json.dumps(row(answers=[]))),
        ("qasper", json.dumps(row(answers="a"))),
        ("trec", json.dumps(row(all_classes=None))),
    ],
)
def test_a_line_that_is_no_official_row_is_named(tmp_path, task, bad):
    write(tmp_path, task, row(all_classes=["a"]), bad)
    with pytest.raises(UserError, match=rf"line 2 of LongBench file {task}\.jsonl is not an official row"):
        Files(str(tmp_path), [task]).rows(task)


def test_an_empty_file_is_a_user_error(tmp_path):
    write(tmp_path, "qasper")
    with pytest.raises(UserError, match=r"qasper\.jsonl has no rows"):
        Files(str(tmp_path), ["qasper"]).rows("qasper")


def test_the_hub_out_of_reach_is_a_user_error(tmp_path, monkeypatch):
    # the hub's library has read its environment already
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as refusal:
        Files("hub", ["qasper"])
    last = str(refusal.value)
    assert last.startswith("cannot get data.zip of THUDM/LongBench from the hub") and "\n" not in last
    assert "unset HF_HUB_OFFLINE" in last
