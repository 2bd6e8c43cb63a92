"""Texts that end an answer: found as it grows, with drafts and without, in batches and alone."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvgauge
from kvgauge.evaluation.decoding import greedy_batch, prefill
from kvgauge.evaluation.drafting import Drafts, greedy_drafted
from kvgauge.evaluation.stopping import StopTexts
from kvgauge.methods.exact.full import Full

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]
TEXTS = ("The answer is 7.\n\nQuestion: next", "a\n\nb", "Ends: END", "no end here", "ünïcödé → ENDE\n")
STOPS = (["\n\n"], ["Question:", "END"], ["→ E"], [])


@pytest.mark.parametrize("model", ["tiny/llama", "smollm2-135m"])
@pytest.mark.parametrize("stops", STOPS)
def test_the_first_token_that_completes_a_text_ends_the_answer(model: str, stops: list[str]) -> None:
    tokenizer = kvgauge.load_tokenizer(model)
    ended = StopTexts(tokenizer, stops)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        for count in range(1, len(ids) + 1):
            decoded = tokenizer.decode(ids[:count], skip_special_tokens=True)
            before = tokenizer.decode(ids[: count - 1], skip_special_tokens=True)
            if any(stop in before for stop in stops):
                break  # the answer has ended: nothing is asked any more
            assert ended(ids[:count]) == any(stop in decoded for stop in stops)


def test_a_batch_ends_row_by_row_and_drafts_leave_the_same_cache(tiny: Tiny) -> None:
    model, tokenizer = kvgauge.load_model("tiny/llama", dtype="float64")[0], tiny[1]
    ids = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(3))

    def run(rows: torch.Tensor, stops: list[list[str]]) -> tuple[list[list[int]], int]:
        cache = Full().new_cache(model)
        logits = prefill(model, rows, cache)
        cache.compress()
        found = greedy_batch(
            model, logits, cache, [16] * len(rows), (), ends=[StopTexts(tokenizer, stop) for stop in stops]
        )
        return found, cache.get_seq_length()

    free, _ = run(ids, [[], []])
    place = next(place for place in range(4, 16) if free[0][place] not in free[0][:place])
    stop = tokenizer.decode(free[0][place : place + 1])
    ended, _ = run(ids, [[stop], []])
    assert ended == [free[0][: place + 1], free[1]]
    alone, length = run(ids[:1], [[stop]])
    assert alone == ended[:1] and length == 40 + place  # the token that ends an answer is not run
    for draft in (free[0], free[0][: place + 1], [*free[0][:2], 5, 5, 5]):
        cache = Full().new_cache(model)
        logits = prefill(model, ids[:1], cache)
        cache.compress()
        drafts = Drafts(8, [], [draft])
        assert greedy_drafted(model, logits, cache, 16, (), drafts, StopTexts(tokenizer, [stop])) == alone[0]
        assert cache.get_seq_length() == length
