from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import kvgauge
from kvgauge.errors import UserError
from kvgauge.evaluation.decoding import check_fits, greedy, greedy_batch, prefill, stop_tokens

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def double() -> PreTrainedModel:
    """In float64 the order of sums decides no token."""
    return kvgauge.load_model("tiny/llama", dtype="float64")[0]


def ids(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 259, (1, tokens), generator=torch.Generator().manual_seed(seed))


def test_chunks_make_no_difference(double: PreTrainedModel) -> None:
    whole = prefill(double, ids(50), DynamicCache())
    parts = prefill(double, ids(50), DynamicCache(), chunk=7)
    torch.testing.assert_close(whole, parts)


def test_greedy_is_what_generate_gives(double: PreTrainedModel) -> None:
    cache = DynamicCache()
    answer = greedy(double, prefill(double, ids(40), cache), cache, 12, stop=())
    wanted = double.generate(ids(40), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answer == wanted[0, 40:].tolist()


def test_a_stop_token_ends_the_answer(double: PreTrainedModel) -> None:
    def run(stop: tuple[int, ...]) -> list[int]:
        cache = DynamicCache()
        return greedy(double, prefill(double, ids(40), cache), cache, 12, stop)

    free = run(())
    ended = run((free[5],))
    assert ended == free[: free.index(free[5])]
    assert greedy(double, prefill(double, ids(40), DynamicCache()), DynamicCache(), 0, ()) == []


def test_a_padded_batch_answers_as_one_by_one(double: PreTrainedModel) -> None:
    rows, limits = [ids(30, 1), ids(18, 2), ids(23, 3)], [9, 4, 7]
    alone = []
    for row, limit in zip(rows, limits, strict=True):
        cache = DynamicCache()
        alone.append(greedy(double, prefill(double, row, cache), cache, limit, ()))
    padded = torch.cat([torch.nn.functional.pad(row, (30 - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(30) >= 30 - row.shape[1] for row in rows])
    cache = DynamicCache()
    logits = prefill(double, padded, cache, chunk=11, mask=mask)
    assert greedy_batch(double, logits, cache, limits, (), mask) == alone


def test_no_tokens_are_an_error(double: PreTrainedModel) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        prefill(double, torch.zeros(1, 0, dtype=torch.long), DynamicCache())


def test_stop_tokens_come_from_both_places(tiny: Tiny) -> None:
    model, tokenizer = tiny
    assert tokenizer.eos_token_id in stop_tokens(model, tokenizer)


def test_a_prompt_beyond_the_positions_is_refused(tiny: Tiny) -> None:
    check_fits(tiny[0], 8000, 192)
    with pytest.raises(UserError, match="8192 positions"):
        check_fits(tiny[0], 8000, 193)


def test_prefill_itself_refuses_a_prompt_beyond_the_positions() -> None:
    model = kvgauge.load_model("tiny/llama", config={"max_position_embeddings": 40})[0]
    cache = kvgauge.build_method("full").new_cache(model)
    prefill(model, ids(30), cache)
    with pytest.raises(UserError, match=r"^a prompt of 41 tokens is longer than the model's 40 positions: use"):
        prefill(model, ids(11), cache)
    prefill(model, ids(10), cache)
    with pytest.raises(UserError, match="40 positions"):
        prefill(model, ids(41), DynamicCache())
    mask = torch.ones(1, 44, dtype=torch.bool)
    mask[:, :4] = False
    prefill(model, ids(44), DynamicCache(), mask=mask)  # padding takes no position
    prefill(model, ids(41), DynamicCache(), beyond_positions=True)
