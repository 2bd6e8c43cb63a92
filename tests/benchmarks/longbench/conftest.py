from pathlib import Path

import pytest

from kvgauge.models.loading import load_tokenizer
from kvgauge.prompts.length import TokenCounter

SAMPLES = Path(__file__).parents[1] / "longbench_samples"


@pytest.fixture
def directory() -> Path:
    """A directory with the official files in miniature."""
    return SAMPLES


@pytest.fixture
def tokenizer():
    """A tokenizer of bytes: an ASCII character is a token."""
    return load_tokenizer("tiny/llama")


@pytest.fixture
def counter(tokenizer) -> TokenCounter:
    return TokenCounter(tokenizer, chat=True)
