import sys

import pytest

from kvgauge.benchmarks.longbench.metrics import first_code_line, first_line, score
from kvgauge.errors import UserError

CLASSES = ["Date", "City", "number", "Other number"]


@pytest.mark.parametrize(
    ("task", "answer", "answers", "expected"),
    [
        # qa_f1: articles, case and punctuation do not count; precision 1/2, recall 1
        ("qasper", "The tall tower!", ["a tower"], 2 / 3),
        ("qasper", "UNANSWERABLE.", ["Unanswerable"], 1),
        ("hotpotqa_e", "yes, yes", ["yes"], 2 / 3),  # words are counted, not only seen
        ("musique", "in 1861", ["nowhere", "1861", "the year 1861"], 2 / 3),  # the best of the references
        ("2wikimqa", "The", ["the"], 0),  # nothing is left to compare
        # words and signs in Chinese: 北京 and 上海 against 北京
        ("multifieldqa_zh", "北京，上海。", ["北京"], 2 / 3),
        ("multifieldqa_zh", "北京！", ["北京"], 1),
        # rouge_l: the longest common subsequence has 2 of 3 words either way
        ("gov_report", "the cat sat", ["the cat ran"], 2 / 3),
        ("gov_report", "the cat", ["The cat"], 1 / 2),  # case counts
        ("qmsum", "b a", ["a b"], 1 / 2),  # and so does order
        ("multi_news_e", " \n ", ["a b"], 0),
        ("multi_news", "...", ["a b"], 0),
        ("multi_news", "a b", [""], 0),
        ("vcsum", "北京 上海", ["北京 广州"], 1 / 2),
        # few-shot answers: the first line only
        ("samsum", "Ann waits.\nDialogue: and so on", ["Ann waits."], 1),
        ("triviaqa", "\n\nred\nQuestion", ["Red", "crimson"], 1),
        ("triviaqa", " \nred", ["red"], 0),  # line breaks are dropped before it, blanks are not
        # count and retrieval: the share of right ones among all numbers
        ("passage_count", "3, 3 or 4", ["3"], 2 / 3),
        ("passage_count_e", "13", ["3"], 0),
        ("passage_count", "three", ["3"], 0),
        ("passage_retrieval_en", "Paragraph 3", ["Paragraph 3"], 1),
        ("passage_retrieval_en", "3 or 30", ["Paragraph 3"], 1 / 2),
        ("passage_retrieval_en_e", "Paragraph 30", ["Paragraph 3"], 0),
        ("passage_retrieval_zh", "是段落3。", ["段落3"], 1),
        ("passage_retrieval_zh", "段落三", ["段落3"], 0),
        # code: similarity of the first line of code, in whole per cent
        ("lcc", "```python\n# add\ncounter.add(1)\nmore()", ["counter.add(1)"], 1),
        ("lcc", "\n\nab", ["ax"], 1 / 2),
        ("repobench-p", "x", ["    x"], 0.33),  # indentation counts
        ("repobench-p_e", "// x\n# x", ["x"], 0),
        ("lcc", "  \nab", ["ab"], 0),  # a blank line is a line
        ("lcc_e", "ab", ["no", "ab"], 1),
    ],
)
def test_scores_by_hand(task, answer, answers, expected):
    assert score(task, answer, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Date", "Date", 1),
        ("\nType: Date\nQuestion: where? City", "Date", 1),
        ("City\nDate", "Date", 0),
        ("Date or City", "City", 1 / 2),
        ("Date, City or Other number", "Date", 1 / 4),  # number is named, too
        ("Other number", "Other number", 1),  # but a class inside the right one is no second guess
        ("number", "Other number", 0),
        ("date", "Date", 0),
        ("", "Date", 0),
    ],
)
def test_classification_by_hand(answer, reference, expected):
    assert score("trec", answer, [reference], CLASSES) == pytest.approx(expected)
    assert score("trec_e", answer, ["nothing", reference], CLASSES) == pytest.approx(expected)


def test_long_sentences_are_scored_at_any_depth_of_calls():
    answer = " ".join(f"a{index}" for index in range(19)) + " end"
    reference = " ".join(f"r{index}" for index in range(1500)) + " end"
    limit = sys.getrecursionlimit()

    def deeper(calls):
        return deeper(calls - 1) if calls else score("gov_report", answer, [reference])

    # one word in common, of 20 and of 1,501
    expected = pytest.approx(2 / (20 + 1501), rel=1e-4)
    assert score("gov_report", answer, [reference]) == expected
    assert deeper(limit // 2) == expected
    assert sys.getrecursionlimit() == limit


def test_first_lines():
    assert first_line("\n\n a \n b") == " a "
    assert first_line("") == ""
    assert first_code_line("\n# no\n`no`\nno // no\n  yes") == "  yes"
    assert first_code_line("# no") == ""


def test_what_cannot_be_scored_is_a_user_error():
    with pytest.raises(UserError, match="unknown LongBench task 'qasper_x'"):
        score("qasper_x", "a", ["a"])
    with pytest.raises(UserError, match="without references"):
        score("qasper", "a", [])
    with pytest.raises(UserError, match="without all_classes"):
        score("lsht", "a", ["a"])
    with pytest.raises(UserError, match="names no paragraph"):
        score("passage_retrieval_en", "3", ["3"])
