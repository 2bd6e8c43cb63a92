from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvgauge.evaluation.store import AnswerStore

RECORD = {"text": "zwölf\u2028", "nbytes": 12, "seconds": {"prefill": 0.25}}


@pytest.fixture
def store(tmp_path: Path) -> AnswerStore:
    store = AnswerStore(tmp_path / "answers")
    store.put("cell", "sample", RECORD)
    return store


def test_a_record_comes_back_as_it_was(store: AnswerStore) -> None:
    assert store.get("cell", "sample") == RECORD
    assert store.get("cell", "other") is None
    assert store.get("other", "sample") is None


@pytest.mark.parametrize("cut", [0, 1, 20, -2])
def test_a_truncated_record_is_not_believed(store: AnswerStore, cut: int) -> None:
    path = store.path("cell", "sample")
    path.write_bytes(path.read_bytes()[:cut])
    assert store.get("cell", "sample") is None


def test_a_changed_record_is_not_believed(store: AnswerStore) -> None:
    path = store.path("cell", "sample")
    path.write_text(path.read_text().replace("12", "13"))
    assert store.get("cell", "sample") is None


def test_valid_json_of_another_shape_is_not_believed(store: AnswerStore) -> None:
    for text in ("[]", "{}", '{"record": 1, "checksum": "x"}', "null"):
        store.path("cell", "sample").write_text(text)
        assert store.get("cell", "sample") is None


def test_a_record_under_another_name_is_not_believed(store: AnswerStore) -> None:
    shutil.copy(store.path("cell", "sample"), store.path("cell", "other"))
    assert store.get("cell", "other") is None


def test_a_damaged_record_is_replaced(store: AnswerStore) -> None:
    store.path("cell", "sample").write_text("damaged")
    store.put("cell", "sample", RECORD)
    assert store.get("cell", "sample") == RECORD


def test_writing_leaves_nothing_else_behind(store: AnswerStore) -> None:
    store.put("cell", "sample", RECORD)
    assert [path.name for path in (store.root / "cell").iterdir()] == ["sample.json"]
