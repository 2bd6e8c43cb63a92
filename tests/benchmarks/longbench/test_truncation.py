import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from kvgauge.benchmarks.longbench.truncation import cut_middle, fit
from kvgauge.errors import UserError
from kvgauge.models.tiny import byte_tokenizer
from kvgauge.prompts.encoding import Template, encode

BYTES = byte_tokenizer()
PLAIN = Template("", "")
CHAT = Template("<user>", "<assistant>")


def test_a_prompt_that_fits_is_left_alone(tokenizer):
    fitted = fit(tokenizer, PLAIN, "abcdef", "ghij", 10)
    assert (fitted.context, fitted.question, fitted.tokens, fitted.truncated) == ("abcdef", "ghij", 10, False)
    assert not fit(tokenizer, PLAIN, "abcdef" * 1000, "ghij", None).truncated


@pytest.mark.parametrize(
    ("context", "question", "keep", "expected"),
    [
        ("0123456789", "ab", 8, ("012389", "ab")),  # half before, half after; the question is the end
        ("0123456789", "ab", 7, ("0129", "ab")),  # of an odd number one is given up
        ("0123456789", "abcdefgh", 8, ("0123", "efgh")),  # a question of more than half loses its beginning
        ("01", "abcdefghij", 8, ("01", "abghij")),  # or its middle, behind a short context
        ("0123456789", "", 4, ("0189", "")),
        ("0123456789", "ab", 12, ("0123456789", "ab")),
    ],
)
def test_cuts_by_hand(tokenizer, context, question, keep, expected):
    assert cut_middle(tokenizer, context, question, keep) == expected


def test_the_template_counts(tokenizer):
    context, question = "x" * 300, "What?"
    fitted = fit(tokenizer, CHAT, context, question, 120)
    assert fitted.truncated
    assert fitted.tokens == encode(tokenizer, CHAT, fitted.context, fitted.question).tokens
    assert 118 <= fitted.tokens <= 120
    assert fitted.whole_tokens == 300 + len("What?") + len("<user><assistant>")
    assert fitted.question == "What?"


@given(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=60),
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.integers(30, 200),
)
def test_what_is_left_are_the_ends_of_the_prompt_and_fits(context, question, limit):
    fitted = fit(BYTES, CHAT, context, question, limit)
    assert fitted.tokens <= limit
    left, whole = fitted.context + fitted.question, context + question
    assert any(whole.startswith(left[:size]) and whole.endswith(left[size:]) for size in range(len(left) + 1))
    assert fitted.truncated == (len(left) < len(whole))


def test_characters_are_never_broken(tokenizer):
    context, question = cut_middle(tokenizer, "湖边的小镇叫云溪", "谁？", 14)
    assert context + question == "湖边的" + "溪谁？"


def test_no_room_beside_the_template_is_a_user_error(tokenizer):
    with pytest.raises(UserError, match=r"leaves no room .* set benchmark\.max_length higher"):
        fit(tokenizer, CHAT, "x" * 100, "y", len("<user><assistant>") + 1)


def test_a_tokenizer_without_offsets_is_a_user_error():
    with pytest.raises(UserError, match="ByT5Tokenizer has no fast backend"):
        cut_middle(ByT5Tokenizer(), "abc", "def", 2)
