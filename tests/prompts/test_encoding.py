from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from kvgauge.errors import UserError
from kvgauge.models.tiny import byte_tokenizer
from kvgauge.prompts.encoding import Prompt, Template, batch_of, encode, encode_follow_up

CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = CHAT
    return tokenizer


def test_the_template_is_split_around_the_texts(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    expected = Template("<|user|>", "<end>\n<|assistant|>", "<end>\n<|user|>")
    assert Template.of(chat_tokenizer) == expected
    assert Template.of(chat_tokenizer, chat=False) == Template("", "")


def test_a_template_may_leave_earlier_turns_out(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "<|user|>{{ messages[-1].content }}<|assistant|>"
    assert Template.of(tokenizer) == Template("<|user|>", "<|assistant|>", "\n\n")


def test_a_conversation_is_what_the_chat_template_makes_of_it(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    template = Template.of(chat_tokenizer)
    first = encode(chat_tokenizer, template, "Context. ", "First?")
    answer = chat_tokenizer("Answer.", add_special_tokens=False).input_ids
    second = encode_follow_up(chat_tokenizer, template, "Second?")
    ids = [*first.context[0].tolist(), *first.question[0].tolist(), *answer, *second[0].tolist()]
    messages = [
        {"role": "user", "content": "Context. First?"},
        {"role": "assistant", "content": "Answer."},
        {"role": "user", "content": "Second?"},
    ]
    whole = chat_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat_tokenizer.decode(ids) == whole


def test_the_answer_prefix_follows_the_template(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = encode(chat_tokenizer, Template.of(chat_tokenizer), "C", "Q", "It is")
    assert chat_tokenizer.decode(prompt.question[0]) == "Q<end>\n<|assistant|>It is"


@pytest.mark.parametrize(
    ("question", "prefix", "expected"),
    [
        ("What is it?", "The answer is", "What is it? The answer is"),
        ("What is it?\n", "The answer is", "What is it?\nThe answer is"),
        ("What is it?", " The answer is", "What is it? The answer is"),
        ("What is it?", "", "What is it?"),
        ("", "The answer is", "The answer is"),
    ],
)
def test_plain_text_keeps_question_and_answer_prefix_apart(
    tokenizer: PreTrainedTokenizerBase, question: str, prefix: str, expected: str
) -> None:
    plain = Template.of(tokenizer, chat=False)
    assert tokenizer.decode(encode(tokenizer, plain, "Text.\n", question, prefix).question[0]) == expected
    follow_up = encode_follow_up(tokenizer, plain, question, prefix)
    assert tokenizer.decode(follow_up[0]) == plain.between + expected


def test_neither_part_is_empty(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = Template("", "")
    assert [part.shape[1] for part in vars(encode(tokenizer, plain, "context", "")).values()] == [6, 1]
    assert [part.shape[1] for part in vars(encode(tokenizer, plain, "", "question")).values()] == [1, 7]
    with pytest.raises(UserError, match="less than two tokens"):
        encode(tokenizer, plain, "", "")


def test_the_middle_is_cut_out() -> None:
    prompt = Prompt(torch.arange(10)[None], torch.tensor([[99]]))
    assert prompt.without_middle(3).context.tolist() == [[0, 1, 2, 6, 7, 8, 9]]
    assert prompt.without_middle(9).context.tolist() == [[9]]
    assert prompt.without_middle(3).question.tolist() == [[99]]


def test_a_batch_is_padded_on_the_left() -> None:
    prompts = [
        Prompt(torch.tensor([[1, 2, 3]]), torch.tensor([[4]])),
        Prompt(torch.tensor([[5]]), torch.tensor([[6, 7]])),
    ]
    batch = batch_of(prompts, [8, 9], pad=0)
    assert batch.context.tolist() == [[1, 2, 3], [0, 0, 5]]
    assert batch.question.tolist() == [[0, 4], [6, 7]]
    assert batch.context_mask is not None and batch.prompt_mask is not None
    assert batch.prompt_mask.int().tolist() == [[1, 1, 1, 0, 1], [0, 0, 1, 1, 1]]
    assert (batch.size, batch.width("context"), batch.width("prompt")) == (2, 3, 5)
    assert (batch.padding("context"), batch.padding("prompt")) == ([0, 2], [1, 2])


def test_equal_lengths_need_no_mask() -> None:
    prompts = [Prompt(torch.tensor([[1, 2]]), torch.tensor([[3]]))] * 2
    batch = batch_of(prompts, [1, 1], pad=0)
    assert batch.context_mask is None and batch.prompt_mask is None
    assert batch.padding("prompt") == [0, 0]
