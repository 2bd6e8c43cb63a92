import pytest

from kvgauge.benchmarks.ruler.scoring import score
from kvgauge.errors import UserError


@pytest.mark.parametrize(
    ("task", "answer", "answers", "expected"),
    [
        ("niah_single_1", " 1234567.", ["1234567"], 1.0),
        ("niah_single_1", " 123456", ["1234567"], 0.0),
        ("niah_multivalue", "1, 2 and 3", ["1", "2", "3", "4"], 0.75),
        ("niah_multiquery", "", ["1", "2"], 0.0),
        ("vt", "aaaaa BBBBB", ["AAAAA", "BBBBB", "CCCCC", "DDDDD", "EEEEE"], 0.4),
        ("cwe", "1. apple 2. pear", ["apple", "pear"], 1.0),
        ("fwe", "abc def", ["abc", "xyz", "uvw"], 1 / 3),
        # any reference is enough for QA, however many there are
        ("qa_1", "in the 10th century", ["10th and 11th centuries", "10th century", "the 10th"], 1.0),
        ("qa_1", "1066", ["10th century", "the 10th"], 0.0),
        ("qa_2", "YES", ["yes"], 1.0),
        # blanks are dropped, control characters part words as a line break does
        ("qa_2", "\n\tArthur's\x00Magazine \n", ["arthur's\nmagazine"], 1.0),
        ("qa_2", "Arthur'sMagazine", ["Arthur's Magazine"], 0.0),
    ],
)
def test_scores_by_hand(task, answer, answers, expected):
    assert score(task, answer, answers) == pytest.approx(expected)


def test_unknown_task_and_missing_references_are_user_errors():
    with pytest.raises(UserError, match="unknown RULER task 'qa_9'"):
        score("qa_9", "x", ["x"])
    with pytest.raises(UserError, match="without references"):
        score("vt", "x", [])
