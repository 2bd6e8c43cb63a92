import itertools
import random

import numpy as np

from kvgauge.benchmarks.ruler.haystack import DEPTHS, draw_places, essay, hide_at_depths, hide_at_places


def test_depths_are_forty_from_top_to_bottom():
    assert list(DEPTHS) == np.round(np.linspace(0, 100, num=40)).astype(int).tolist()


def test_an_essay_is_cut_after_a_word():
    text = essay("One two  three.\nFour five six. Seven.")
    assert text.first(4) == ["One two three.", "Four"]
    assert text.first(6) == ["One two three.", "Four five six."]
    assert text.first(7) == ["One two three.", "Four five six.", "Seven."]
    assert text.first(0) == []


def test_needles_lie_at_their_depth():
    sentences = [f"s{number}." for number in range(10)]
    assert hide_at_depths(["<a>", "<b>", "<c>"], [0, 50, 100], sentences) == (
        "<a> s0. s1. s2. s3. s4. <b> s5. s6. s7. s8. s9. <c>"
    )


def test_items_keep_their_order_and_a_line_between_them():
    for seed in range(50):
        places = draw_places(5, random.Random(seed))
        hidden = hide_at_places(list("abcde"), places, ["-"] * 8)
        assert [item for item in hidden if item != "-"] == list("abcde")
        assert len(hidden) == 13
        assert all("-" in pair for pair in itertools.pairwise(hidden))


def test_items_reach_both_ends():
    first = {hide_at_places(["x"], draw_places(1, random.Random(seed)), ["-"] * 4).index("x") for seed in range(100)}
    assert first == {0, 1, 2, 3}
