import pytest

from kvgauge.corpora.sources import Sources
from kvgauge.models.loading import load_tokenizer
from kvgauge.prompts.length import PromptLength


@pytest.fixture(scope="session")
def sources() -> Sources:
    return Sources.find("wheel")


@pytest.fixture(scope="session")
def prompt_length() -> PromptLength:
    """Tokens of a prompt for the embedded model, chat template and default system prompt included."""
    tokenizer = load_tokenizer("smollm2-135m")

    def measure(context: str, question: str, answer_prefix: str) -> int:
        turn = [{"role": "user", "content": context + question}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + answer_prefix
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return measure
