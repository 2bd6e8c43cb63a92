"""Texts that end an answer, found while it grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StopTexts:
    """Says of the tokens of an answer whether one of some texts stands at their end.

    Only the last tokens are decoded, as many as the longest text can have: a token has a byte at least. A text may be
    found a token late, where its bytes end inside one.

    Attributes:
        tokenizer: of the model.
        texts: that end an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[str]
    _window: int = field(init=False)

    def __post_init__(self) -> None:
        longest = max((len(text.encode()) for text in self.texts), default=0)
        object.__setattr__(self, "_window", longest + 1)

    def __call__(self, answer: Sequence[int]) -> bool:
        if not self.texts:
            return False
        end = self.tokenizer.decode(answer[-self._window :], skip_special_tokens=True)
        return any(text in end for text in self.texts)
