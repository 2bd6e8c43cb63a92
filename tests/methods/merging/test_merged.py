"""The streaming caches of merged entries, through models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import kvgauge
from kvgauge import UserError
from kvgauge.architecture.facts import model_facts
from kvgauge.attend import counted_attention
from kvgauge.evaluation.decoding import prefill
from kvgauge.kernels.cpu import operators
from kvgauge.methods.merging.merged import MergedLayer
from kvgauge.methods.merging.merging_cache import MergingCache
from kvgauge.methods.merging.merging_entries import MergingEntries

CONTEXT, QUESTION = 150, 40
METHODS = ["kvslimmer", "asymkv", "mean_merge", "streaming_llm"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return kvgauge.load_model("tiny/llama")[0]


@pytest.fixture(scope="module")
def ids() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(3, 300, (2, CONTEXT + QUESTION))


def cache_of(model: PreTrainedModel, name: str, **options: Any) -> MergingCache:
    method = kvgauge.build_method(name, **{"start": 4, "window": 32, "budget": None} | options)
    cache = method.new_cache(model)
    assert isinstance(cache, MergingCache)
    return cache


def answer_logits(
    model: PreTrainedModel, cache: MergingCache, ids: Tensor, mask: Tensor | None = None, context: int = CONTEXT
) -> Tensor:
    prefill(model, ids[:, :context], cache, mask=mask)
    cache.compress()
    return prefill(model, ids[:, context:], cache, mask=mask)


def peak_entries(cache: MergingCache) -> int:
    return max(layer.tally.most_entries for layer in cache.layers if isinstance(layer, MergedLayer))


@pytest.mark.parametrize("name", METHODS)
def test_the_limit_holds_at_all_times(model: PreTrainedModel, ids: Tensor, name: str) -> None:
    cache = cache_of(model, name, max_entries=50)
    prefill(model, ids[:, :CONTEXT], cache)
    assert peak_entries(cache) <= 50 + 32
    cache.compress()
    assert [cache.physical_length(layer) for layer in range(4)] == [50] * 4
    assert cache.get_seq_length() == CONTEXT
    assert cache.compressed
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert peak_entries(cache) <= 50 + 32
    assert cache.get_seq_length() == 2 * CONTEXT + QUESTION


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [{"max_entries": 50}, {"budget": 0.4}])
def test_the_chunks_of_the_prefill_make_no_difference(
    model: PreTrainedModel, ids: Tensor, name: str, options: dict[str, Any]
) -> None:
    whole = answer_logits(model, cache_of(model, name, **options), ids)
    cache = cache_of(model, name, **options)
    prefill(model, ids[:, :CONTEXT], cache, chunk=7)
    cache.compress()
    torch.testing.assert_close(prefill(model, ids[:, CONTEXT:], cache, chunk=1), whole, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pairs", ["chain", "disjoint"])
@pytest.mark.parametrize("name", ["kvslimmer", "asymkv", "mean_merge"])
@pytest.mark.parametrize("clip", [None, 2])
def test_a_padded_batch_answers_as_its_rows_do(
    model: PreTrainedModel, ids: Tensor, name: str, pairs: str, clip: int | None
) -> None:
    options = {"budget": 0.4, "pairs": pairs, "clip": clip}
    pad, gap = 37, 5  # in front of the first row's context, and in front of its question
    mask = torch.ones(2, CONTEXT + QUESTION, dtype=torch.bool)
    mask[0, :pad] = False
    mask[0, CONTEXT : CONTEXT + gap] = False
    batch = answer_logits(model, cache_of(model, name, **options), ids, mask)
    kept = ids[:1, mask[0]]
    alone = answer_logits(model, cache_of(model, name, **options), kept, context=CONTEXT - pad)
    torch.testing.assert_close(batch[:1], alone, rtol=1e-4, atol=1e-3)
    other = answer_logits(model, cache_of(model, name, **options), ids[1:])
    torch.testing.assert_close(batch[1:], other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_padding_that_is_still_to_come_counts_in_the_limit(model: PreTrainedModel, ids: Tensor, name: str) -> None:
    """Compressed after the prompt: the limit during the context depends on the padding of the question."""
    pad, gap = 37, 12
    mask = torch.ones(2, CONTEXT + QUESTION, dtype=torch.bool)
    mask[0, :pad] = False
    mask[0, CONTEXT : CONTEXT + gap] = False

    def logits(rows: Tensor, context: int, known: Tensor | None, padding: list[int] | None) -> Tensor:
        cache = cache_of(model, name, budget=0.4)
        cache.expect(rows.shape[1], padding)
        prefill(model, rows[:, :context], cache, mask=None if known is None else known[:, :context])
        last = prefill(model, rows[:, context:], cache, mask=known)
        cache.compress()
        step = last.argmax(-1, keepdim=True)
        known = None if known is None else torch.cat([known, known.new_ones(len(rows), 1)], dim=1)
        return torch.cat([last, prefill(model, step, cache, mask=known)])

    batch = logits(ids, CONTEXT, mask, [pad + gap, 0])
    alone = logits(ids[:1, mask[0]], CONTEXT - pad, None, None)
    torch.testing.assert_close(batch[::2], alone, rtol=1e-4, atol=1e-3)


def test_a_padded_batch_of_streaming_llm(model: PreTrainedModel, ids: Tensor) -> None:
    mask = torch.ones(2, CONTEXT + QUESTION, dtype=torch.bool)
    mask[0, :61] = False
    cache = cache_of(model, "streaming_llm", max_entries=40)
    batch = answer_logits(model, cache, ids, mask)
    alone = answer_logits(model, cache_of(model, "streaming_llm", max_entries=40), ids[:1, 61:], context=CONTEXT - 61)
    torch.testing.assert_close(batch[:1], alone, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_merging_equal_keys_does_not_change_the_logits(ids: Tensor, name: str) -> None:
    """A model whose keys are all zero attends to nothing but the number of tokens: merging must keep it."""
    model = kvgauge.load_model("tiny/llama")[0]
    for layer in model.get_decoder().layers:
        layer.self_attn.k_proj.weight.zero_()
    with torch.no_grad():
        full = model(ids).logits[:, -1]
    cache = cache_of(model, name, max_entries=30, **({} if name == "streaming_llm" else {"clip": None}))
    logits = answer_logits(model, cache, ids)
    error = float((logits - full).abs().max() / full.abs().max())
    assert (error > 1e-2) if name == "streaming_llm" else (error < 1e-5)


def test_streaming_llm_attends_to_sinks_and_the_recent_tokens_at_positions_within_the_cache(
    model: PreTrainedModel, ids: Tensor
) -> None:
    """One layer deep, what is kept does not depend on what was evicted, so a short prompt gives the same logits."""
    shallow = kvgauge.load_model("tiny/llama")[0]
    shallow.get_decoder().layers = shallow.get_decoder().layers[:1]
    shallow.config.num_hidden_layers = 1
    cache = cache_of(shallow, "streaming_llm", max_entries=24)
    logits = answer_logits(shallow, cache, ids[:1, : CONTEXT + 3])
    kept = torch.cat([ids[:1, :4], ids[:1, CONTEXT - 20 : CONTEXT + 3]], dim=1)
    with torch.no_grad():
        expected = shallow(kept, past_key_values=DynamicCache()).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_long_answers_are_merged_too(model: PreTrainedModel, ids: Tensor, name: str) -> None:
    cache = cache_of(model, name, budget=0.4, **({} if name == "streaming_llm" else {"clip": None}))
    prefill(model, ids[:1, :CONTEXT], cache)
    cache.compress()
    limit = cache.physical_length()
    made = model.generate(ids[:1], past_key_values=cache, max_new_tokens=100, do_sample=False, eos_token_id=None)
    assert made.shape[1] == CONTEXT + QUESTION + 100
    assert cache.get_seq_length() == CONTEXT + QUESTION + 99
    assert limit <= cache.physical_length() < limit + 32
    assert peak_entries(cache) <= max(limit, int(0.4 * CONTEXT)) + 32


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_steps_with_and_without_compiled_kernels_agree(
    model: PreTrainedModel, ids: Tensor, name: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 70  # more than two windows are merged on the way
    mask = torch.ones(2, CONTEXT + steps, dtype=torch.bool)
    mask[0, :20] = not padded
    logits = []
    for compiled in (True, False):
        monkeypatch.setattr(operators, "available", lambda compiled=compiled: compiled)
        cache = cache_of(model, name, budget=0.4)
        prefill(model, ids[:, :CONTEXT], cache, mask=mask[:, :CONTEXT])
        cache.compress()
        made = [
            prefill(model, ids[:, step : step + 1], cache, mask=mask[:, : CONTEXT + step + 1]) for step in range(steps)
        ]
        assert cache.layers[0].entries.held.keys.dimension_major == compiled
        logits.append(torch.stack(made))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_generate_compresses_by_itself(model: PreTrainedModel, ids: Tensor) -> None:
    method = kvgauge.build_method("kvslimmer", start=4, window=32, budget=0.4)
    cache = method.new_cache(model, context_length=CONTEXT)
    mask = torch.ones(2, CONTEXT, dtype=torch.long)
    mask[0, :20] = 0
    model.generate(ids[:, :CONTEXT], attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert cache.compressed_tokens == CONTEXT
    assert cache.physical_length() < 0.4 * CONTEXT + 5


def test_positions_follow_the_cardinalities(model: PreTrainedModel, ids: Tensor) -> None:
    cache = cache_of(model, "kvslimmer", max_entries=40, clip=2)
    prefill(model, ids[:1, :CONTEXT], cache)
    cache.compress()
    for layer in cache.layers:
        assert isinstance(layer.entries, MergingEntries)
        cardinalities = layer.entries.held.cardinalities
        assert cardinalities is not None
        assert int(cardinalities.max()) == 2
        assert int(cardinalities.sum()) == CONTEXT - layer.positions.lags[0] < CONTEXT
    unclipped = cache_of(model, "kvslimmer", max_entries=40, clip=None)
    prefill(model, ids[:1, :CONTEXT], unclipped)
    for layer in unclipped.layers:
        assert isinstance(layer.entries, MergingEntries)
        cardinalities = layer.entries.held.cardinalities
        assert cardinalities is not None
        assert int(cardinalities.sum()) == CONTEXT
        assert layer.positions.lags == [0]


def test_no_matrix_of_all_queries_is_held(model: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    weights = counted_attention._weights

    def watched(scores: Tensor, *arguments: Any) -> Tensor:
        sizes.append(scores.numel() * scores.element_size())
        return weights(scores, *arguments)

    whole = answer_logits(model, cache_of(model, "kvslimmer", max_entries=50), ids)
    monkeypatch.setattr(counted_attention, "_weights", watched)
    monkeypatch.setattr(counted_attention.counted_attention, "__defaults__", (None, 8192))
    cut = answer_logits(model, cache_of(model, "kvslimmer", max_entries=50), ids)
    assert max(sizes) <= 8192
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_rows_can_be_chosen_repeated_and_reordered(model: PreTrainedModel, ids: Tensor, name: str) -> None:
    def fresh() -> MergingCache:
        cache = cache_of(model, name, budget=0.4)
        prefill(model, ids[:, :CONTEXT], cache)
        cache.compress()
        return cache

    expected = prefill(model, ids[:, CONTEXT:], fresh())
    cache = fresh()
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(prefill(model, ids[[1, 0], CONTEXT:], cache), expected[[1, 0]], rtol=1e-4, atol=1e-4)
    cache = fresh()
    cache.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(prefill(model, ids[1:, CONTEXT:], cache), expected[1:], rtol=1e-4, atol=1e-4)
    cache = fresh()
    cache.batch_repeat_interleave(2)
    twice = ids.repeat_interleave(2, dim=0)[:, CONTEXT:]
    torch.testing.assert_close(prefill(model, twice, cache), expected.repeat_interleave(2, dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_reset_cache_is_as_new(model: PreTrainedModel, ids: Tensor, name: str) -> None:
    cache = cache_of(model, name, budget=0.4)
    first = answer_logits(model, cache, ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0
    torch.testing.assert_close(answer_logits(model, cache, ids), first, rtol=0, atol=0)


def test_bytes_are_those_of_the_live_tensors(model: PreTrainedModel, ids: Tensor) -> None:
    cache = cache_of(model, "kvslimmer", max_entries=50, clip=5)
    prefill(model, ids[:, :CONTEXT], cache)
    assert cache.nbytes_by_part()["statistics"] > 0
    cache.compress()
    parts = cache.nbytes_by_part()
    assert parts == {
        "keys": 4 * 2 * 2 * 50 * 16 * 4,
        "values": 4 * 2 * 2 * 50 * 16 * 4,
        "cardinalities": 4 * 2 * 50 * 4,
    }
    assert cache.nbytes() == sum(parts.values())
    prefill(model, ids[:, CONTEXT:], cache)
    assert cache.nbytes_by_part()["angles"] == 4 * 2 * 2 * 16 * 4


def test_dense_and_crop_refuse_and_so_does_adopt(model: PreTrainedModel, ids: Tensor) -> None:
    cache = cache_of(model, "kvslimmer", max_entries=50)
    prefill(model, ids[:, :40], cache)
    keys, _ = cache.dense(0)
    assert keys.shape == (2, 2, 40, 16)  # nothing is merged yet
    prefill(model, ids[:, 40:CONTEXT], cache)
    for layer in range(4):
        with pytest.raises(UserError, match="no longer stand for single tokens"):
            cache.dense(layer)
    with pytest.raises(UserError, match="cannot be cropped"):
        cache.crop(-1)
    full = kvgauge.build_method("full").new_cache(model)
    prefill(model, ids[:, :40], full)
    with pytest.raises(UserError, match="its own prefill"):
        cache_of(model, "kvslimmer", max_entries=50).adopt(full)


def test_guards_are_counted_per_layer(model: PreTrainedModel, ids: Tensor) -> None:
    cache = cache_of(model, "mean_merge", max_entries=50)
    prefill(model, ids[:, :CONTEXT], cache)
    assert cache.guard_counts == [0] * 4
    assert all(count > 0 for count in cache.merge_counts)
    plain = cache_of(model, "asymkv", max_entries=50)
    with torch.no_grad():
        model(ids[:, :CONTEXT], past_key_values=plain)  # a forward pass without a loss: nothing to weigh the keys by
    assert plain.guard_counts == plain.merge_counts
    assert plain.remarks() == {"merges": plain.merge_counts, "guarded_merges": plain.guard_counts}
    assert all(count > 0 for count in plain.guard_counts)


def test_sinks_above_the_budget_are_an_error_once_the_length_is_known(model: PreTrainedModel, ids: Tensor) -> None:
    cache = cache_of(model, "kvslimmer", budget=0.1, start=20)
    with pytest.raises(UserError, match="lower start, raise the budget"):
        prefill(model, ids[:, :CONTEXT], cache)


def test_an_evicting_cache_keeps_the_first_and_the_newest_tokens_of_the_whole_sequence(tiny, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, 200, seed=3)
    method = kvgauge.build_method("streaming_llm", budget=0.5, start=4, window=16, while_decoding={"every": 24})
    cache = method.new_cache(model)
    cache.expect(100)
    with torch.no_grad():
        model(ids[:, :100], past_key_values=cache)
        cache.compress()
        for start in range(100, 200):
            model(ids[:, start : start + 1], past_key_values=cache)
            known = start + 1 - (start + 1 - 100) % 24  # of the last compression
            entries = method.entries(known, model_facts(model))
            assert cache.physical_length(0) == entries + start + 1 - known
        full = kvgauge.build_method("full").new_cache(model)
        model(ids, past_key_values=full)
    behind = cache.physical_length(0) - 4
    _, values = full.dense(0)  # those of the first layer do not depend on what was evicted
    expected = torch.cat([values[:, :, :4], values[:, :, 200 - behind :]], dim=2)
    torch.testing.assert_close(cache.own[0].entries.held.values.view(), expected)
