"""What holds for every task: it fits, fills, repeats, and asks for what is hidden."""

import re
from collections import Counter

import pytest

from kvgauge.benchmarks.ruler import TASKS, generate
from kvgauge.errors import UserError

LENGTHS = (512, 1024, 2048, 4096)
# one needle of two UUIDs is a sixth of 512 tokens: whole needles cannot come closer
COARSE = {("niah_multikey_3", 512): 0.8}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
def test_samples_fit_and_fill_the_length(task, length, prompt_length, sources):
    for sample in generate(task, length, 3, 42, prompt_length, sources):
        measured = prompt_length(sample.context, sample.question, sample.answer_prefix)
        assert sample.tokens == measured + TASKS[task].max_new_tokens
        assert COARSE.get((task, length), 0.9) * length <= sample.tokens <= length


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_depends_on_its_index_and_seed_alone(task, prompt_length, sources):
    few = list(generate(task, 768, 2, 7, prompt_length, sources))
    more = list(generate(task, 768, 4, 7, prompt_length, sources))
    other = list(generate(task, 768, 2, 8, prompt_length, sources))
    assert more[:2] == few
    assert len({sample.context + sample.question for sample in [*more, *other]}) == 6


def test_samples_have_the_fields_of_a_prompt(prompt_length, sources):
    samples = [sample for task in TASKS for sample in generate(task, 600, 2, 1, prompt_length, sources)]
    assert len({sample.id for sample in samples}) == len(samples) == 26
    assert samples[1].id == "niah_single_1-600-0001"
    for sample in samples:
        row = sample.to_dict()
        assert list(row) == [
            "id", "task", "context", "question", "answer_prefix", "answers", "max_new_tokens", "length", "tokens",
        ]  # fmt: skip
        assert isinstance(row["answers"], list)
        assert row["answers"]
        assert row["length"] == 600
        assert sample.answer_prefix == sample.answer_prefix.strip()


@pytest.mark.parametrize("task", [task for task in TASKS if not task.startswith("qa")])
def test_answers_are_in_the_context_and_not_in_the_question(task, prompt_length, sources):
    for sample in generate(task, 1024, 5, 3, prompt_length, sources):
        assert len(set(sample.answers)) == len(sample.answers)
        asked = re.findall(r"[\w-]+", f"{sample.question} {sample.answer_prefix}".lower())
        for answer in sample.answers:
            assert answer in sample.context
            assert answer.lower() not in asked


@pytest.mark.parametrize(
    ("task", "needles", "answers"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needles_are_whole_and_answer_the_query(task, needles, answers, prompt_length, sources):
    for sample in generate(task, 1024, 4, 5, prompt_length, sources):
        hidden = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.(?=\s)", sample.context)
        assert len(hidden) == needles
        queries = re.search(r"for (.+) mentioned", sample.question).group(1).replace(", and ", ", ").split(", ")
        assert {value for key, value in hidden if key in queries} == set(sample.answers)
        assert len(sample.answers) == answers


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_needle_haystacks_hide_one_key_among_distinct_others(task, prompt_length, sources):
    for sample in generate(task, 2048, 3, 5, prompt_length, sources):
        hidden = re.findall(r"^One of the special magic \w+ for (\S+) is: (\S+)\.$", sample.context, re.MULTILINE)
        values = dict(hidden)
        assert len(values) == len(hidden) > 10
        query = re.search(r"for (\S+) mentioned", sample.question).group(1)
        assert (values[query],) == sample.answers


def test_needles_reach_every_part_of_the_essay(prompt_length, sources):
    places = [
        sample.context.index("One of the special magic") / len(sample.context)
        for sample in generate("niah_single_2", 1024, 30, 0, prompt_length, sources)
    ]
    assert min(places) < 0.25
    assert max(places) > 0.75


@pytest.mark.parametrize("length", [512, 2048])
def test_variable_chain_leads_to_every_answer(length, prompt_length, sources):
    for sample in generate("vt", length, 4, 2, prompt_length, sources):
        value = re.search(r"assigned the value (\d+)", sample.question).group(1)
        assigned = dict(re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", sample.context))
        chain = [next(name for name, source in assigned.items() if source == value)]
        while (after := next((name for name, source in assigned.items() if source == chain[-1]), None)) is not None:
            chain.append(after)
        assert tuple(chain) == sample.answers
        assert len(chain) == 5


def test_the_solved_example_is_there_where_it_fits(prompt_length, sources):
    [with_example] = generate("vt", 512, 1, 0, prompt_length, sources)
    assert with_example.context.count("Memorize and track") == 2
    [without] = generate("vt", 300, 1, 0, prompt_length, sources)
    assert without.context.count("Memorize and track") == 1
    assert "they are: " in with_example.context
    assert "they are:" not in without.context
    [common] = generate("cwe", 1024, 1, 0, prompt_length, sources)
    assert common.context.count("Below is a numbered list") == 2


@pytest.mark.parametrize(("length", "frequencies"), [(1024, {6, 1}), (4096, {30, 3})])
def test_common_words_have_the_official_frequencies(length, frequencies, prompt_length, sources):
    for sample in generate("cwe", length, 2, 1, prompt_length, sources):
        task = sample.context.rsplit("Memorize the ones that appear most often.\n", 1)[1]
        counts = Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", task))
        assert set(counts.values()) == frequencies
        assert {word for word, count in counts.items() if count == max(frequencies)} == set(sample.answers)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_three_most_frequent_coded_words_are_unambiguous(length, prompt_length, sources):
    for sample in generate("fwe", length, 5, 1, prompt_length, sources):
        text = sample.context.split("coded words. ", 1)[1].split()
        ranked = Counter(word for word in text if word != "...").most_common(4)
        assert tuple(word for word, _ in ranked[:3]) == sample.answers
        assert ranked[2][1] > ranked[3][1]


@pytest.mark.parametrize("task", ["niah_multivalue", "vt", "cwe", "fwe", "qa_2"])
def test_a_length_too_short_names_the_smallest_that_works(task, prompt_length, sources):
    with pytest.raises(UserError, match=f"task {task} does not fit in 150 tokens: use a length of") as caught:
        list(generate(task, 150, 3, 0, prompt_length, sources))
    smallest = int(re.search(r"length of (\d+)", str(caught.value)).group(1))
    assert len(list(generate(task, smallest, 3, 0, prompt_length, sources))) == 3
    with pytest.raises(UserError, match="does not fit"):
        list(generate(task, smallest - 1, 3, 0, prompt_length, sources))


def test_unknown_task_and_no_samples_are_user_errors(prompt_length, sources):
    with pytest.raises(UserError, match="unknown RULER task 'niah_singel_1': did you mean 'niah_single_1'"):
        generate("niah_singel_1", 512, 1, 0, prompt_length, sources)
    with pytest.raises(UserError, match="at least one sample"):
        generate("vt", 512, 0, 0, prompt_length, sources)
