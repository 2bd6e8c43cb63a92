"""Sizes, budgets and bad input of the merging methods, on every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvgauge
from kvgauge import UserError
from kvgauge.evaluation.decoding import prefill
from kvgauge.methods.merging.merging import GAMMA, Streaming

METHODS = ["kvslimmer", "asymkv", "mean_merge", "streaming_llm"]
ARCHITECTURES = ["tiny/llama", "tiny/mistral", "tiny/qwen2", "tiny/qwen3"]


def streaming(name: str, **options: Any) -> Streaming:
    method = kvgauge.build_method(name, **options)
    assert isinstance(method, Streaming)
    return method


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", METHODS)
def test_more_entries_than_tokens_give_the_models_logits(architecture: str, name: str) -> None:
    model = kvgauge.load_model(architecture)[0]
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (2, 100))
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, :23] = 0
    cache = streaming(name, max_entries=101, window=16, start=4).new_cache(model)
    with torch.no_grad():
        full = model(ids, attention_mask=mask).logits
        first = model(ids[:, :70], attention_mask=mask[:, :70], past_key_values=cache).logits
        cache.compress()
        second = model(ids[:, 70:], attention_mask=mask, past_key_values=cache).logits
    logits = torch.cat([first, second], dim=1)
    for row, pad in enumerate((0, 23)):
        error = (logits[row, pad:] - full[row, pad:]).abs().max() / full[row, pad:].abs().max()
        assert float(error) < 1e-4


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", [1.0, 0.5, 0.3, 0.125])
def test_measured_bytes_meet_the_budget(name: str, budget: float) -> None:
    model = kvgauge.load_model("tiny/llama")[0]
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (1, 300))
    cache = streaming(name, budget=budget, window=64, start=4).new_cache(model)
    prefill(model, ids, cache)
    cache.compress()
    full = kvgauge.full_nbytes(model, 300)
    assert cache.nbytes() <= budget * full
    # one entry of one layer is the granularity
    assert cache.nbytes() > (budget - 0.03) * full
    assert (cache.physical_length() == 300) == (budget == 1.0)


@pytest.mark.parametrize("name", METHODS)
def test_which_size_decides(name: str) -> None:
    facts = kvgauge.architecture.facts.model_facts(kvgauge.load_model("tiny/llama")[0])
    assert streaming(name, budget=0.5, recent=100).entries(1000, facts) == 132
    assert streaming(name, budget=0.5, recent=100, max_entries=64).entries(1000, facts) == 64
    assert streaming(name, budget=0.5).label == f"{name}@0.5"
    assert streaming(name, recent=100).label == f"{name}@132e"
    assert not streaming(name).needs.exact_prefill


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": 0, "recent": 1}, "2 are the least"),
        ({"start": 1, "recent": 0}, "2 are the least"),
        ({"window": 0}, "window 1 or more"),
        ({"start": -1}, "start is 0 or more"),
        ({"budget": None}, "needs a budget"),
        ({"budget": 1.5}, "outside"),
        ({"max_entries": 32}, "lower start or keep more"),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_bad_sizes_are_one_line(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        kvgauge.build_method(name, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clip": 0}, "below 1"),
        ({"gamma": 0.0}, "not above 0"),
        ({"pairs": "chains"}, "did you mean 'chain'"),
    ],
)
@pytest.mark.parametrize("name", ["kvslimmer", "asymkv", "mean_merge"])
def test_bad_merges_are_one_line(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        kvgauge.build_method(name, **options)


def test_the_papers_discount() -> None:
    assert pytest.approx(656.6, abs=0.1) == GAMMA


def test_the_choice_of_pairs_and_the_rule_of_keys_matter() -> None:
    """The options reach the cache: each gives other keys."""
    model = kvgauge.load_model("tiny/llama")[0]
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (1, 200))
    seen = []
    for name, options in [
        ("mean_merge", {}),
        ("kvslimmer", {}),
        ("asymkv", {}),
        ("kvslimmer", {"clip": 2}),
        ("kvslimmer", {"pairs": "disjoint"}),
        ("kvslimmer", {"gamma": 10.0}),
        ("kvslimmer", {"window": 50}),
        ("kvslimmer", {"start": 1}),
    ]:
        options = {"budget": 0.3, "window": 32, "start": 4} | options
        cache = streaming(name, **options).new_cache(model)
        seen.append(prefill(model, ids, cache))
        cache.compress()
    for first in range(len(seen)):
        for second in range(first):
            assert float((seen[first] - seen[second]).abs().max()) > 1e-3
