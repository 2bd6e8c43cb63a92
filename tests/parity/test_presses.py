"""What the presses of kvpress promise, one and all: the model's logits at full size, their bytes, batches, beams."""

from __future__ import annotations

import gc

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import attention_modules, full_nbytes, model_facts
from kvgauge.attend.mask import CAUSAL
from kvgauge.layers.inputs import LayerInputs

PRESSES = kvgauge.list_methods("kvpress")
# What stands in the way of these on a small random model without a tokenizer, a table or a download.
REFUSE = {
    "kvpress/dms": "threshold",
    "kvpress/duo_attention": "nothing for this model",
    "kvpress/expected_attention_stats": "nothing for this model",
    "kvpress/kvgrad": "failed with OSError",
    "kvpress/kvzap": "nothing for this model",
    "kvpress/kvzip": "failed with OSError",
    "kvpress/lukv": "nothing for this model",
    "kvpress/per_layer_compression": "compression_ratios",
    "kvpress/qfilter": "nothing for this model",
}
RUN = [name for name in PRESSES if name not in REFUSE]
MASK = ["kvpress/adakv", "kvpress/critical_adakv", "kvpress/think"]
OWN_SIZE = ["kvpress/composed", "kvpress/simlayerkv"]
FREE = [name for name in RUN if name not in (*MASK, *OWN_SIZE)]
CONTEXT = 512


def prefilled(method, model, ids, chunk=CONTEXT):
    cache = method.new_cache(model)
    with torch.no_grad():
        for part in ids.split(chunk, dim=1):
            model(part, past_key_values=cache)
        cache.compress()
    return cache


def asked(model, cache, question):
    with torch.no_grad():
        return model(question, past_key_values=cache).logits


@pytest.mark.parametrize(("name", "reason"), REFUSE.items())
def test_a_press_that_lacks_something_says_what(name, reason, tiny, tokens):
    with pytest.raises(kvgauge.UserError, match=reason):
        prefilled(kvgauge.build_method(name), tiny("tiny/llama"), tokens(1, CONTEXT))


@pytest.mark.parametrize("name", PRESSES)
def test_a_press_refuses_latents(name, tiny):
    with pytest.raises(kvgauge.UserError, match="MLA"):
        kvgauge.build_method(name).new_cache(tiny("tiny/deepseek_v2"))


@pytest.mark.parametrize("name", PRESSES)
def test_at_full_size_the_logits_are_the_model_s(name, tiny, tokens):
    model = tiny("tiny/llama")
    ids, question = tokens(2, 64, seed=3), tokens(2, 11, seed=4)
    cache = prefilled(kvgauge.build_method(name).lossless(model_facts(model)), model, ids, chunk=40)
    expected = model(torch.cat([ids, question], dim=1)).logits[:, -11:]
    assert float((asked(model, cache, question) - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("model_name", ["tiny/mistral", "tiny/qwen2", "tiny/qwen3"])
@pytest.mark.parametrize("name", ["kvpress/snapkv", "kvpress/adakv", "kvpress/key_rerotation"])
def test_other_architectures(name, model_name, tiny, tokens):
    model, ids, question = tiny(model_name), tokens(1, 128), tokens(1, 5, seed=4)
    expected = model(torch.cat([ids, question], dim=1)).logits[:, -5:]
    whole = asked(
        model, prefilled(kvgauge.build_method(name, budget=1.0, compression_ratio=None), model, ids), question
    )
    assert float((whole - expected).norm() / expected.norm()) < 1e-4
    pressed = asked(model, prefilled(kvgauge.build_method(name), model, ids), question)
    assert float((pressed - expected).norm() / expected.norm()) > 1e-4


@pytest.mark.parametrize("budget", [0.875, 0.5, 0.25])
@pytest.mark.parametrize("name", FREE)
def test_measured_bytes_keep_to_the_budget(name, budget, tiny, tokens):
    model = tiny("tiny/llama")
    cache = prefilled(kvgauge.build_method(name, budget=budget), model, tokens(1, CONTEXT))
    assert budget - 0.04 <= cache.nbytes() / full_nbytes(model, CONTEXT) <= 1.02 * budget
    assert cache.nominal_share == pytest.approx(budget)
    gc.collect()
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for buffer in layer.buffers()
        for tensor in vars(buffer).values()
        if isinstance(tensor, torch.Tensor)
    }
    assert sum(held.values()) == cache.nbytes()
    assert cache.inputs is None


@pytest.mark.parametrize("name", MASK)
def test_a_press_that_masks_reaches_no_budget_and_says_so(name, tiny, tokens):
    with pytest.raises(kvgauge.UserError, match=r"no budget of 0\.5"):
        kvgauge.build_method(name, budget=0.5)
    settings = {"key_channel_compression_ratio": 0.5} if name == "kvpress/think" else {"compression_ratio": 0.5}
    model = tiny("tiny/llama")
    cache = prefilled(kvgauge.build_method(name, **settings), model, tokens(1, CONTEXT))
    assert cache.nominal_share < 0.8
    assert cache.nbytes() >= full_nbytes(model, CONTEXT)


@pytest.mark.parametrize("name", RUN)
def test_chunks_of_the_prefill_and_rows_of_a_batch_change_nothing(name, tiny, tokens):
    model, method = tiny("tiny/llama"), kvgauge.build_method(name)
    ids, question = tokens(2, 200, seed=5), tokens(1, 7, seed=6)
    expected = [asked(model, prefilled(method, model, row), question) for row in ids.split(1)]
    chunked = asked(model, prefilled(method, model, ids[:1], chunk=77), question)
    torch.testing.assert_close(chunked, expected[0], rtol=1e-3, atol=1e-3)
    try:
        actual = asked(model, prefilled(method, model, ids), question.expand(2, -1))
    except kvgauge.UserError as refusal:
        assert "batch_size=1" in str(refusal)
        return
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", RUN)
def test_padding_is_refused(name, tiny, tokens):
    model, mask = tiny("tiny/llama"), torch.ones(2, 200, dtype=torch.long)
    mask[1, :9] = 0
    cache = kvgauge.build_method(name, **({"key_channel_compression_ratio": 0.5} if "think" in name else {})).new_cache(
        model
    )
    with pytest.raises(kvgauge.UserError, match="batch_size=1"):
        model(tokens(2, 200), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("name", ["kvpress/snapkv", "kvpress/adakv", "kvpress/key_rerotation"])
def test_generate_beams_crop_and_reset(name, tiny, tokens):
    model, method = tiny("tiny/llama"), kvgauge.build_method(name)
    ids, question, wrong = tokens(1, 200, seed=7), tokens(1, 3, seed=8), tokens(1, 5, seed=9)
    cache = prefilled(method, model, ids)
    expected = asked(model, cache, question)
    with pytest.raises(kvgauge.UserError, match="cropped"):
        cache.crop(-4)
    cache.crop(-3)
    asked(model, cache, wrong)
    cache.crop(-5)
    torch.testing.assert_close(asked(model, cache, question), expected)
    cache.reset()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.compress()
    torch.testing.assert_close(asked(model, cache, question), expected)

    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    greedy = model.generate(ids, past_key_values=method.new_cache(model, context_length=200), **settings)
    cache = prefilled(method, model, ids[:, :-1])  # generate's first token sees the context uncompressed
    assert greedy.shape == (1, 205) and cache.get_seq_length() == 199
    beams = model.generate(ids, past_key_values=method.new_cache(model, context_length=200), num_beams=3, **settings)
    assert beams.shape == (1, 205)


def test_rerotated_keys_stand_right_before_the_question(tiny, tokens):
    """A context of its first and last tokens, rotated anew, is what the model makes of them in its first layer."""
    model, method = tiny("tiny/llama"), kvgauge.build_method("kvpress/key_rerotation", budget=0.25)
    ids = tokens(1, 200, seed=7)
    cache = prefilled(method, model, ids)
    kept = torch.cat([ids[:, :4], ids[:, -46:]], dim=1)  # four sinks, and the most recent of 50 tokens
    short = prefilled(kvgauge.build_method("full"), model, kept)
    turned = cache.layers[0].keys_buffer.view()
    query = torch.randn(1, 1, 1, turned.shape[-1], generator=torch.manual_seed(0))
    rotary = model.get_decoder().rotary_emb

    def scores(keys, position):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        cos, sin = rotary(query, torch.tensor([[position]]))
        rotated, _ = apply_rotary_pos_emb(query, query, cos, sin)
        return rotated @ keys.mT

    torch.testing.assert_close(scores(turned, 200), scores(short.layers[0].dense()[0], 50), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", RUN)
def test_nothing_is_left_behind_in_the_model(name, tiny, tokens):
    model = tiny("tiny/llama")
    modules = attention_modules(model)
    gc.collect()  # caches of other tests watch the same model until they are gone
    hooks, known = [len(module._forward_pre_hooks) for module in modules], [set(dir(module)) for module in modules]
    other = kvgauge.build_method("full").new_cache(model)
    cache = kvgauge.build_method(name).new_cache(model)
    with torch.no_grad():
        model(tokens(1, 30), past_key_values=other)  # somebody else's pass is none of the press's business
        assert cache.inputs is None or all(known is None for known in cache.inputs.layers)
        model(tokens(1, CONTEXT), past_key_values=cache)
        cache.compress()
    assert [len(module._forward_pre_hooks) for module in modules] == hooks
    assert [set(dir(module)) for module in modules] == known


def test_an_exception_leaves_nothing_behind(tiny, tokens):
    model = tiny("tiny/llama")
    modules = attention_modules(model)
    gc.collect()  # caches of other tests watch the same model until they are gone
    hooks, known = [len(module._forward_pre_hooks) for module in modules], [set(dir(module)) for module in modules]
    with pytest.raises(kvgauge.UserError, match="greater than the window size"):
        prefilled(kvgauge.build_method("kvpress/snapkv"), model, tokens(1, 20))
    cache = kvgauge.build_method("kvpress/snapkv").new_cache(model)
    handle = modules[-1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens(1, 100), past_key_values=cache)
    handle.remove()
    del cache
    gc.collect()
    assert [len(module._forward_pre_hooks) for module in modules] == hooks
    assert [set(dir(module)) for module in modules] == known


def test_masked_entries_are_not_attended_to(tiny, tokens):
    """AdaKV's masks against evicting the same entries by hand, one kv-head after the other."""
    model, ids = tiny("tiny/llama"), tokens(1, 100)
    cache = prefilled(kvgauge.build_method("kvpress/adakv"), model, ids)
    layer = cache.layers[1]
    query = torch.randn(1, 4, 1, layer.keys_buffer.view().shape[-1], generator=torch.manual_seed(1))
    heads = model_facts(model)
    query = query[:, :1].expand(1, heads.num_attention_heads, 1, -1)
    layer.append(
        torch.zeros_like(layer.keys_buffer.view()[:, :, :1]), torch.zeros_like(layer.keys_buffer.view()[:, :, :1])
    )
    layer.logical_length += 1
    actual = layer.attend_compressed(query, CAUSAL, 0.25)
    kept = torch.cat([layer.kept, torch.ones(1, heads.num_key_value_heads, 1, dtype=torch.bool)], dim=-1)
    for head in range(heads.num_attention_heads):
        source = head // heads.num_key_value_groups
        keys = layer.keys_buffer.view()[0, source, kept[0, source]].double()
        values = layer.values_buffer.view()[0, source, kept[0, source]].double()
        expected = torch.softmax(query[0, head, 0].double() @ keys.T * 0.25, dim=-1) @ values
        torch.testing.assert_close(actual[0, 0, head].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_synthetic_prefill_is_refused(tiny):
    model = tiny("tiny/llama")
    cache = kvgauge.build_method("kvpress/snapkv").new_cache(model)
    facts = model_facts(model)
    states = torch.randn(1, facts.num_key_value_heads, 100, facts.head_dim)
    for layer in cache.layers:
        layer.update(states, states)
    with pytest.raises(kvgauge.UserError, match="prefill=real"):
        cache.compress()


@pytest.mark.parametrize("name", [*FREE, *MASK])
def test_one_prefill_serves_all(name, tiny, tokens):
    """A press that adopts an exact prefill prunes as one that has seen its own."""
    model, ids, question = tiny("tiny/llama"), tokens(1, CONTEXT), tokens(1, 7, seed=4)
    settings = {"key_channel_compression_ratio": 0.5} if name == "kvpress/think" else {"compression_ratio": 0.5}
    method = kvgauge.build_method(name, **settings)
    own = prefilled(method, model, ids, chunk=40)
    exact = kvgauge.build_method("full").new_cache(model)
    with pytest.raises(kvgauge.UserError, match="sees more of the prefill"):
        method.new_cache(model).adopt(exact)
    exact.inputs = LayerInputs(model, exact)
    with torch.no_grad():
        for part in ids.split(40, dim=1):
            model(part, past_key_values=exact)
    for _ in range(2):  # what is shared is left as it was
        cache = method.new_cache(model)
        cache.adopt(exact)
        cache.compress()
        assert cache.nbytes_by_part() == own.nbytes_by_part()
        for mine, theirs in zip(cache.layers, own.layers, strict=True):
            torch.testing.assert_close(mine.keys_buffer.view(), theirs.keys_buffer.view(), rtol=0, atol=0)
            assert (mine.kept is None) == (theirs.kept is None)
            assert mine.kept is None or torch.equal(mine.kept, theirs.kept)
    torch.testing.assert_close(asked(model, cache, question), asked(model, own, question), rtol=0, atol=0)
