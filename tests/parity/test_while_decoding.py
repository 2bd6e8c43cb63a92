"""Every family compresses while decoding: budgets at every multiple, lossless settings, drafts, batches, loops."""

from __future__ import annotations

import json

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import model_facts
from kvgauge.contract.budget import reference_nbytes
from kvgauge.evaluation.decoding import greedy, prefill
from kvgauge.evaluation.drafting import Drafts, greedy_drafted
from kvgauge.testing import check_while_decoding, compressed_cache, relative_error

EVERY = 16
INT4 = {"bits": 4, "group": EVERY}
CELLS = [
    ("full", {}),
    ("streaming_llm", {"budget": 0.5, "start": 4}),
    ("streaming_llm", {"max_entries": 40, "start": 4, "budget": None}),
    ("kqsvd", {"budget": 0.5}),
    ("kqsvd", {"budget": 0.5, "sinks": 4, "window": 16}),
    ("kqsvd", {"budget": 0.5, "sinks": 4, "compress_prefill": True}),
    ("eigen", {"budget": 0.25}),
    ("mean_merge", {"budget": 0.5, "start": 4}),
    ("kvslimmer", {"budget": 0.5, "start": 4}),
    ("kvslimmer", {"budget": 0.25, "start": 4, "pairs": "disjoint"}),
    ("kvslimmer", {"budget": 0.5, "start": 4, "pairs": "bounded", "clip": 8}),
    ("asymkv", {"budget": 0.5, "start": 4}),
    ("xkv", {"budget": 0.5, "group_size": 2}),
    ("xkv", {"budget": 0.5, "group_size": 2, "rope": "post", "sinks": 4, "svd": "randomized"}),
    ("xkv", {"budget": 0.625, "group_size": 2, "sr": {"chunk": 8, "budget": 32}}),
    ("xkv", {"budget": 0.75, "group_size": 2, "start_layer": 1, "normalize": "layer"}),
    ("xkv_aware", {"budget": 0.5, "group_size": 2}),
    ("single_svd", {"budget": 0.5}),
    ("minicache", {"budget": 0.875}),
    ("minicache", {"budget": None}),
    ("kvquant", {"budget": 0.4}),
    ("quantized_cache", {"budget": 0.75}),
    ("compose", {"budget": 0.4, "compose": ["full", INT4]}),
    ("compose", {"budget": 0.5, "compose": [{"method": "kqsvd", "sinks": 4, "window": 8}, INT4 | {"bits": 8}]}),
    ("compose", {"budget": 0.5, "compose": [{"method": "xkv", "group_size": 2, "sinks": 4}, "int8"]}),
    ("compose", {"budget": None, "compose": ["full", {"method": "kivi4", "group": EVERY, "residual": EVERY}]}),
    ("compose", {"budget": None, "compose": ["full", {"method": "turboquant_prod", "bits": 3.5}]}),
    ("compose", {"budget": None, "compose": ["full", "int4_rotated"]}),
    ("kvpress/knorm", {"budget": 0.5}),
    ("kvpress/keydiff", {"budget": 0.25}),
    ("kvpress/tova", {"budget": None, "compression_ratio": 0.5}),
    ("kvpress/random", {"budget": 0.5}),
]
NAMES = [f"{name}-{json.dumps(options)[1:40]}" for name, options in CELLS]
ROWS_ALONE = ("quantized_cache", "kvpress/knorm", "kvpress/keydiff", "kvpress/tova", "kvpress/random")  # or not at all


def built(name, options, fit, every=EVERY):
    method = kvgauge.build_method(name, while_decoding={"every": every}, **options)
    return method, fit(method, "tiny/llama")


def opened(method, model, fitted, ids, mask=None):
    """A compressed cache of the context `ids` (batch, tokens)."""
    cache = method.new_cache(model, fitted)
    prefill(model, ids, cache, mask=mask)
    with torch.no_grad():
        cache.compress()
    return cache


@pytest.mark.parametrize(("name", "options"), CELLS, ids=NAMES)
def test_budgets_hold_at_every_multiple_and_lossless_settings_lose_nothing(name, options, tiny, fit):
    method, fitted = built(name, options, fit)
    check_while_decoding(method, tiny("tiny/llama"), fitted, periods=3)


def but(*left_out):
    """The parameters of all cells but these."""
    kept = [(cell, name) for cell, name in zip(CELLS, NAMES, strict=True) if cell[0] not in left_out]
    return pytest.mark.parametrize(("name", "options"), [cell for cell, _ in kept], ids=[name for _, name in kept])


@but("kvpress/knorm")  # one token at two places has first-layer keys of one norm: rounding decides which of them stays
def test_drafts_give_the_greedy_answer_and_the_same_cache(name, options, tiny, fit, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, 130, seed=1)
    method, fitted = built(name, options, fit)

    def asked():
        cache = opened(method, model, fitted, ids[:, :110])
        return cache, prefill(model, ids[:, 110:], cache)

    cache, logits = asked()
    wanted = greedy(model, logits, cache, 60, ())
    wrong = [token if index % 9 else token ^ 1 for index, token in enumerate(wanted, start=1)]
    mine, logits = asked()
    assert greedy_drafted(model, logits, mine, 60, (), Drafts(12, answers=[wrong])) == wanted
    assert [one.tokens for one in mine.recompressions] == [110 + EVERY * period for period in (1, 2, 3, 4)]
    assert [one.after for one in mine.recompressions] == [one.after for one in cache.recompressions]
    assert mine.nbytes_by_part() == cache.nbytes_by_part()


@but(*ROWS_ALONE)  # the engine answers their prompts one by one
def test_a_padded_batch_gives_what_its_sequences_give_alone(name, options, tiny, fit, tokens):
    model = tiny("tiny/llama")
    method, fitted = built(name, options, fit)
    long, short, question = tokens(1, 96, seed=4), tokens(1, 79, seed=5), tokens(1, 40, seed=6)
    alone = []
    for context in (long, short):
        cache = opened(method, model, fitted, context)
        alone.append(prefill(model, question, cache))
    batch = torch.cat([long, torch.cat([torch.zeros(1, 17, dtype=torch.long), short], dim=1)])
    mask = torch.ones(2, 96 + 40, dtype=torch.bool)
    mask[1, :17] = False
    cache = method.new_cache(model, fitted)
    prefill(model, batch, cache, mask=mask[:, :96])
    with torch.no_grad():
        cache.compress()
    together = prefill(model, question.expand(2, -1), cache, mask=mask)
    # asymkv reads the rows of a padded batch one by one, in windows of their own, and puts them together at the end
    assert [one.tokens for one in cache.recompressions] == ([136] if name == "asymkv" else [112, 128])
    # a budget of the batch's length may buy the shorter row more than it gets alone; its rank of xkv it gets by its own
    assert relative_error(together[:1], alone[0]) < 1e-3
    if name in ("full", "streaming_llm", "mean_merge", "kvslimmer", "asymkv", "xkv", "xkv_aware", "single_svd"):
        assert relative_error(together[1:], alone[1]) < 1e-3


@pytest.mark.parametrize(("name", "options"), CELLS, ids=NAMES)
def test_generate_is_the_loop_of_forward_passes(name, options, tiny, fit, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, 96, seed=7)
    method, fitted = built(name, options, fit)
    cache = method.new_cache(model, fitted, context_length=96)
    settings = {"max_new_tokens": 36, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    generated = model.generate(ids, past_key_values=cache, eos_token_id=None, **settings)
    mine = compressed_cache(method, model, fitted, ids)
    with torch.no_grad():
        logits = model(ids, past_key_values=method.new_cache(model, fitted, context_length=96)).logits[:, -1]
    assert generated[0, 96:].tolist() == greedy(model, logits, mine, 36, ())
    assert [one.tokens for one in cache.recompressions] == [112, 128]


def test_a_cache_of_beams_goes_on_compressing(tiny, fit, tokens):
    model, ids = tiny("tiny/llama"), tokens(2, 96, seed=8)
    for name, options in CELLS:
        if name in ROWS_ALONE:
            continue
        method, fitted = built(name, options, fit)
        swapped, straight = (opened(method, model, fitted, rows) for rows in (ids, ids.flip(0)))
        step = tokens(2, 20, seed=9)
        prefill(model, step.flip(0), swapped)
        prefill(model, step, straight)
        swapped.reorder_cache(torch.tensor([1, 0]))
        more = tokens(2, 20, seed=10)
        assert relative_error(prefill(model, more, swapped), prefill(model, more, straight)) < 1e-3, name
        assert len(swapped.recompressions) == 2


def test_a_pass_beyond_a_multiple_is_compressed_at_its_end(tiny, fit, tokens):
    model = tiny("tiny/llama")
    for name, options in CELLS:
        method, fitted = built(name, options, fit)
        cache = opened(method, model, fitted, tokens(1, 96, seed=2))
        with torch.no_grad():
            model(tokens(1, 25, seed=3), past_key_values=cache)
            model(tokens(1, 6, seed=4), past_key_values=cache)
            assert [one.tokens for one in cache.recompressions] == [121], name
            model(tokens(1, 1, seed=5), past_key_values=cache)
        assert [one.tokens for one in cache.recompressions] == [121, 128], name
        budget = method.budget or 1.0
        allowed = budget * reference_nbytes(method, model_facts(model), 128)
        assert cache.nbytes() <= 1.02 * allowed or name == "kvpress/tova", name
        cache.reset()
        assert not cache.recompressions and cache.get_seq_length() == 0


@pytest.mark.parametrize("options", [{"budget": 0.6}, {"rank": 32, "budget": None, "group_size": 2}])
def test_latents_of_mla(options):
    model, _ = kvgauge.load_model("tiny/deepseek_v2")
    method = kvgauge.build_method("xkv", while_decoding={"every": EVERY}, **options)
    check_while_decoding(method, model)


def test_projected_latents_of_mla(tokens):
    model, _ = kvgauge.load_model("tiny/deepseek_v2")
    method = kvgauge.build_method("kqsvd", budget=0.6, while_decoding={"every": EVERY})
    check_while_decoding(method, model, method.fit(kvgauge.collect(model, [tokens(4, 160)]), model))
