"""Rows of LongBench's schema over RULER's own sources."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvgauge import configuration
from kvgauge.benchmarks.longbench import DATASETS, LongBench, score
from kvgauge.benchmarks.longbench.datasets import names
from kvgauge.benchmarks.longbench.rows import Files
from kvgauge.benchmarks.longbench.stand_in import MAKERS, QUESTION_TYPES, main, question_type, rows
from kvgauge.corpora.sources import Sources
from kvgauge.errors import UserError

WORDS, SAMPLES = 400, 12


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources.find("wheel")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stand_in")
    main([str(directory), "--words", str(WORDS), "--samples", str(SAMPLES)])
    return directory


def test_there_is_a_file_for_every_dataset_of_the_edition(written):
    assert set(MAKERS) == set(names("stand_in"))
    assert {path.name for path in written.iterdir()} == {f"{name}.jsonl" for name in MAKERS}


@pytest.mark.parametrize("name", MAKERS)
def test_rows_are_official_ones_in_schema_and_tell_where_they_come_from(written, name):
    lines = [json.loads(line) for line in (written / f"{name}.jsonl").read_text().splitlines()]
    assert len(lines) == SAMPLES
    for line, row in zip(lines, Files(str(written), [name]).rows(name), strict=True):
        assert line["dataset"] == name
        assert row.source_id.startswith("stand-in-")
        assert row.words == len(row.context.split()) + len(row.input.split()) > WORDS / 3
        assert row.answers and all(row.answers)


@pytest.mark.parametrize("name", ["multifieldqa_en", "hotpotqa", "triviaqa"])
def test_the_text_holds_the_answer(written, name):
    found = [
        any(answer in row.context + row.input for answer in row.answers)
        for row in Files(str(written), [name]).rows(name)
        if row.answers[0] not in ("yes", "no")
    ]
    assert found and all(found)


def test_several_documents_are_numbered_passages(written):
    for row in Files(str(written), ["hotpotqa"]).rows("hotpotqa"):
        numbers = [int(number) for number in re.findall(r"^Passage (\d+):$", row.context, re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 2


def test_few_shot_examples_are_answered_and_the_last_is_not(written):
    for row in Files(str(written), ["triviaqa"]).rows("triviaqa"):
        assert re.fullmatch(r"Passage:\n[^\n]+\nQuestion:\n[^\n]+\nAnswer:", row.input)
        assert row.input.split("\n")[1] not in row.context
        for example in row.context.split("\n\n"):
            assert re.fullmatch(r"Passage:\n[^\n]+\nQuestion:\n[^\n]+\nAnswer:\n[^\n]+", example)
    for row in Files(str(written), ["trec"]).rows("trec"):
        kinds = re.findall(r"^Type: (\w+)$", row.context, re.MULTILINE)
        assert set(kinds) <= set(QUESTION_TYPES) == set(row.all_classes or ())
        assert row.input.endswith("\nType:") and row.input not in row.context
        assert score("trec_stand_in", row.answers[0], row.answers, row.all_classes) == 1


@pytest.mark.parametrize(
    ("query", "kind"),
    [
        ("Who won?", "Person"),
        ("whose idea", "Person"),
        ("Whole numbers are what?", ""),
        ("In what year did it end?", "Date"),
        ("How much is it?", "Number"),
        ("How is it?", ""),
        ("Why?", "Reason"),
    ],
)
def test_question_types(query, kind):
    assert question_type(query) == kind


def test_more_samples_add_to_those_there_are_and_the_seed_counts(sources):
    for name in MAKERS:
        few, more, other = (
            list(rows(sources, name, WORDS, samples, seed)) for samples, seed in ((2, 0), (4, 0), (2, 1))
        )
        assert more[:2] == few != other


def test_no_row_is_longer_than_asked_unless_its_own_passages_are(sources):
    for name in MAKERS:
        sizes = [row["length"] - len(row["input"].split()) for row in rows(sources, name, 1000, 20)]
        # passage numbers and labels are not counted
        assert max(sizes) <= 1000 * 1.05 and min(sizes) > 500


def test_prompts_are_named_as_the_stand_in(written, counter):
    node = configuration.read("benchmark", "longbench_stand_in") | {"source": str(written)}
    config = configuration.build(node, "benchmark", samples=2)
    assert isinstance(config, LongBench) and config.edition == "stand_in"
    prompts = list(config.prompts(counter))
    assert [prompt.task for prompt in prompts] == [f"{name}_stand_in" for name in names("stand_in") for _ in range(2)]
    assert {prompt.facts["dataset"] for prompt in prompts} <= set(DATASETS)


def test_a_missing_directory_says_how_to_make_it(tmp_path, counter):
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"make them with python -m kvgauge\.benchmarks\.longbench\.stand_in"):
            list(LongBench(edition="stand_in", source=str(source)).prompts(counter))


def test_more_samples_than_questions_are_refused(sources):
    with pytest.raises(UserError, match=r"^there are 5928 questions for triviaqa: set --samples to that or fewer$"):
        list(rows(sources, "triviaqa", WORDS, 6000))


@pytest.mark.parametrize("arguments", [["--words", "0"], ["--samples", "-1"], ["--source", "nowhere"]])
def test_bad_arguments_end_in_one_line_and_code_2(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
