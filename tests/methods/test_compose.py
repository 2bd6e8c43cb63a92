"""Compositions: their bytes, their errors, what they share with their members, and what they refuse."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import model_facts
from kvgauge.attend import attention
from kvgauge.contract.budget import reference_nbytes
from kvgauge.contract.fitting import fit_config, learns
from kvgauge.contract.identity import config, fit_version, method_version
from kvgauge.errors import UserError
from kvgauge.kernels.cpu import operators
from kvgauge.methods.exact.full import Full
from kvgauge.store.rows import BlockwiseRows

CONTEXT = 384
XKV = {"method": "xkv", "group_size": 2}
SLIM = {"method": "kvslimmer", "window": 64, "start": 4}
EXACT_ENDS = {"method": "kqsvd", "sinks": 4, "window": 32}


def build(*members, **fields):
    return kvgauge.build_method("compose", compose=list(members), **fields)


def context_cache(method, model, fitted, ids, mask=None):
    cache = method.new_cache(model, fitted)
    cache.expect(ids.shape[1], None if mask is None else (mask == 0).sum(1).tolist())
    with torch.no_grad():
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache.compress()
    return cache


def answer(method, model, fitted, ids, question):
    cache = context_cache(method, model, fitted, ids)
    with torch.no_grad():
        return model(question, past_key_values=cache).logits


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


COMPOSITIONS = {
    "kqsvd-int4": (("kqsvd", "int4"), 0.15),
    "kqsvd-int3-token": (("kqsvd", {"bits": 3, "axis": "token", "balance": False}), 0.3),
    "kqsvd-ends-int4": ((EXACT_ENDS, "int4"), 0.25),
    "ksvd-allocated-int8": (({"method": "ksvd", "allocate": "energy"}, "int8"), 0.4),
    "xkv-int4": ((XKV, "int4"), 0.15),
    "xkv-int2-token": (({**XKV, "sinks": 4}, {"bits": 2, "axis": "token", "group": 16}), 0.15),
    "xkv-outer-int8": (({**XKV, "start_layer": 2, "normalize": "layer"}, "int8"), 0.4),
    "slim-int4": ((SLIM, "int4"), 0.2),
    "slim-kqsvd": ((SLIM, "kqsvd"), 0.25),
    "slim-kqsvd-int4": ((SLIM, "kqsvd", "int4"), 0.15),
    "slim-fixed-kqsvd-int8": (({**SLIM, "budget": 0.5}, "kqsvd", "int8"), 0.15),
    "streaming-int4": (({"method": "streaming_llm", "start": 4, "window": 64}, "int4"), 0.15),
    "xkv": ((XKV,), 0.4),
    "kqsvd-kivi2": (("kqsvd", {"method": "kivi2", "residual": 32}), 0.15),
    "kqsvd-turboquant": (("kqsvd", {"method": "turboquant", "bits": 3.5}), 0.16),
    "xkv-turboquant-prod": (({**XKV, "sinks": 4}, {"method": "turboquant_prod", "bits": 3}), 0.15),
    "kqsvd-int4-rotated": (("kqsvd", "int4_rotated"), 0.38),
    "slim-turboquant": ((SLIM, {"method": "turboquant", "key_bits": 4, "value_bits": 2}), 0.15),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_measured_bytes_are_just_below_the_budget(name, tiny, fit, tokens):
    members, budget = COMPOSITIONS[name]
    method, model = build(*members, budget=budget), tiny("tiny/llama")
    cache = context_cache(method, model, fit(method, "tiny/llama"), tokens(1, CONTEXT))
    full = reference_nbytes(method, model_facts(model), CONTEXT)
    assert 0.94 * budget < cache.nbytes() / full <= budget
    assert sum(cache.nbytes_by_part().values()) == cache.nbytes()


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_bytes_are_foretold_exactly(name, tiny, fit, tokens):
    members, budget = COMPOSITIONS[name]
    method, model = build(*members, budget=budget), tiny("tiny/llama")
    facts, fitted = model_facts(model), fit(method, "tiny/llama")
    cache = context_cache(method, model, fitted, tokens(1, CONTEXT))
    foretold = method.nbytes(facts, fitted, CONTEXT)
    assert cache.nbytes() == foretold


def test_sixteen_bits_are_the_reference(tiny, fit, tokens):
    model = tiny("tiny/llama")  # in float32
    assert reference_nbytes(build("full", "int4"), model_facts(model), 100) == kvgauge.full_nbytes(model, 100) // 2
    assert reference_nbytes(build("kqsvd"), model_facts(model), 100) == kvgauge.full_nbytes(model, 100)


@pytest.mark.parametrize("axis", [None, "token", "channel"])
def test_errors_fall_with_the_bits(axis, tiny, tokens):
    model, ids, question = tiny("tiny/llama"), tokens(1, CONTEXT, seed=1), tokens(1, 20, seed=2)
    expected = answer(Full(), model, None, ids, question)
    methods = [build("full", {"bits": bits, "axis": axis, "group": 16}, budget=None) for bits in (8, 4, 3, 2)]
    errors = [relative(answer(method, model, None, ids, question), expected) for method in methods]
    assert errors[0] < 1.5e-2
    assert errors == sorted(errors) and errors[3] > 5 * errors[0]


@pytest.mark.parametrize("members", [("kqsvd",), (XKV,), (SLIM,), (SLIM, "ksvd"), ("full",)])
def test_members_at_full_size_are_the_model(members, tiny, fit, tokens):
    model, ids, question = tiny("tiny/llama"), tokens(1, CONTEXT, seed=1), tokens(1, 20, seed=2)
    method = build(*members, "int4").lossless(model_facts(model))
    assert method.needs.reference_bits is None and method.members.quantizer is None
    actual = answer(method, model, fit(method, "tiny/llama"), ids, question)
    assert relative(actual, answer(Full(), model, None, ids, question)) < 1e-4


def test_eight_bits_change_a_projection_little(tiny, fit, tokens):
    model, ids, question = tiny("tiny/llama"), tokens(1, CONTEXT, seed=1), tokens(1, 20, seed=2)
    for member in ({"method": "kqsvd", "rank": 9}, {**XKV, "rank": 20}, {**SLIM, "budget": 0.5}):
        plain, small = build(member, budget=None), build(member, "int8", budget=None)
        fitted = fit(plain, "tiny/llama")
        expected = answer(plain, model, fitted, ids, question)
        assert 0 < relative(answer(small, model, fitted, ids, question), expected) < 3e-2


def test_a_composition_of_one_is_its_member(tiny, fit, tokens):
    model, ids, question = tiny("tiny/llama"), tokens(1, CONTEXT, seed=1), tokens(1, 20, seed=2)
    for member in ({"method": "kqsvd", "budget": 0.5}, {**XKV, "budget": 0.5}, {**SLIM, "budget": 0.5}):
        fields = {key: value for key, value in member.items() if key != "method"}
        alone, composed = kvgauge.build_method(member["method"], **fields), build(member, budget=None)
        fitted = fit(alone, "tiny/llama")
        expected = answer(alone, model, fitted, ids, question)
        assert relative(answer(composed, model, fitted, ids, question), expected) < 1e-5


SIZED = {  # whatever the length of the context, so that a row alone and in a batch has the same sizes
    "kqsvd": [{"method": "kqsvd", "rank": 12}],
    "ends": [{**EXACT_ENDS, "rank": 12}],
    "xkv": [{**XKV, "rank": 20}],
    "sinks": [{**XKV, "rank": 20, "sinks": 4}],
    "outer": [{**XKV, "rank": 20, "start_layer": 2}],
    "full": ["full"],
    "slim": [{**SLIM, "max_entries": 60}],
    "slim-kqsvd": [{**SLIM, "max_entries": 60}, {**EXACT_ENDS, "rank": 12}],
    "streaming": [{"method": "streaming_llm", "start": 4, "window": 64, "max_entries": 60}],
}


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("name", SIZED)
def test_left_padding_changes_nothing(name, axis, tiny, fit, tokens):
    method, model = build(*SIZED[name], {"bits": 4, "axis": axis}, budget=None), tiny("tiny/llama")
    fitted = fit(method, "tiny/llama")
    long, short, question = tokens(1, 150, seed=4), tokens(1, 117, seed=5), tokens(1, 12, seed=6)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 33, dtype=torch.long), short], dim=1)])
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[1, :33] = 0
    cache = context_cache(method, model, fitted, batch, mask)
    longer = torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], dim=1)
    positions = (longer.cumsum(1) - 1)[:, -12:]
    with torch.no_grad():
        actual = model(
            question.expand(2, -1), attention_mask=longer, position_ids=positions, past_key_values=cache
        ).logits
    for row, ids in enumerate((long, short)):
        # a rounding error of a projection can move a code by one
        assert relative(actual[row], answer(method, model, fitted, ids, question)[0]) < 5e-3


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_batches_are_reordered_and_decoding_goes_on(name, tiny, fit, tokens):
    members, budget = COMPOSITIONS[name]
    method, model = build(*members, budget=budget), tiny("tiny/llama")
    fitted, ids, step = fit(method, "tiny/llama"), tokens(2, CONTEXT, seed=2), tokens(2, 3, seed=3)
    swapped = context_cache(method, model, fitted, ids)
    swapped.reorder_cache(torch.tensor([1, 0]))
    plain = context_cache(method, model, fitted, ids)
    with torch.no_grad():
        actual = model(step.flip(0), past_key_values=swapped).logits
        expected = model(step, past_key_values=plain).logits.flip(0)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert swapped.get_seq_length() == CONTEXT + 3


@pytest.mark.parametrize("name", ["kqsvd-int4", "xkv-int4", "kqsvd-int3-token"])
def test_decoded_tokens_are_cropped(name, tiny, fit, tokens):
    members, budget = COMPOSITIONS[name]
    method, model = build(*members, budget=budget), tiny("tiny/llama")
    cache = context_cache(method, model, fit(method, "tiny/llama"), tokens(1, CONTEXT))
    with torch.no_grad():
        expected = model(tokens(1, 4, seed=3), past_key_values=cache).logits
        cache.crop(-4)
        assert cache.get_seq_length() == CONTEXT
        torch.testing.assert_close(model(tokens(1, 4, seed=3), past_key_values=cache).logits, expected)


@pytest.mark.parametrize("name", ["slim-int4", "slim-kqsvd-int4"])
def test_frozen_entries_merge_no_more(name, tiny, fit, tokens):
    members, budget = COMPOSITIONS[name]
    method, model = build(*members, budget=budget), tiny("tiny/llama")
    cache = context_cache(method, model, fit(method, "tiny/llama"), tokens(1, CONTEXT))
    merges, entries = cache.merge_counts, cache.physical_length()
    assert entries < CONTEXT and min(merges) > 0
    with torch.no_grad():
        for part in tokens(1, 200, seed=4).split(50, dim=1):
            model(part, past_key_values=cache)
    assert cache.merge_counts == merges and cache.physical_length() == entries + 200
    lagging = [layer for layer in cache.layers if any(layer.positions.lags)]
    assert cache.nbytes_by_part().get("angles", 0) == len(lagging) * 2 * 16 * 4
    with pytest.raises(UserError, match="no longer stand for single tokens"):
        cache.dense(0)


@pytest.mark.parametrize("projector", ["kqsvd", EXACT_ENDS])
def test_steps_over_merged_entries_are_the_same_without_compiled_kernels(projector, tiny, fit, tokens, monkeypatch):
    method, model = build(SLIM, projector, budget=0.25), tiny("tiny/llama")
    fitted, ids, later = fit(method, "tiny/llama"), tokens(2, CONTEXT, seed=2), tokens(2, 3, seed=3)
    logits = []
    for compiled in (True, False):
        monkeypatch.setattr(operators, "available", lambda compiled=compiled: compiled)
        cache = context_cache(method, model, fitted, ids)
        with torch.no_grad():
            logits.append([model(step, past_key_values=cache).logits for step in later.split(1, dim=1)])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_merged_entries_are_projected_at_their_positions(tiny, fit, tokens):
    """Against the formula: softmax of ``q K'ᵀ/√d + ln c`` over K' = (K A) Bᵀ of the merged keys, float64."""
    model, ids = tiny("tiny/llama"), tokens(1, 200, seed=1)
    merger = kvgauge.build_method("kvslimmer", window=64, start=4, max_entries=90)
    merged = context_cache(merger, model, None, ids)
    method = build({**SLIM, "max_entries": 90}, {"method": "kqsvd", "rank": 9}, budget=None)
    fitted = fit(method, "tiny/llama")
    composed = context_cache(method, model, fitted, ids)
    source, layer = merged.layers[1], composed.layers[1]
    keys, values = (part.double() for part in source.entries.dense())
    cardinalities = source.entries.held.cardinalities
    A, B, A_v, B_v = (tensor.double() for tensor in fitted.truncated(1, 9, 9))
    query = torch.randn(1, 4, 1, 16)
    grouped = query.double().view(1, 2, 2, 16)
    scores = grouped @ (keys @ A @ B.mT).mT * 0.25 + cardinalities.double().log()
    expected = (scores.softmax(-1) @ (values @ A_v @ B_v.mT)).view(1, 1, 4, 16)
    actual = layer.entries.attend(query, 0.25)
    assert relative(actual.double(), expected) < 1e-5


def test_the_fit_of_the_projector_serves_the_whole(tiny, moments):
    model = tiny("tiny/llama")
    alone, whole = kvgauge.build_method("kqsvd"), build(SLIM, "kqsvd", "int4")
    assert learns(whole) and fit_config(whole) == fit_config(alone)
    assert fit_version(whole) == fit_version(alone)
    whole.new_cache(model, alone.fit(moments("tiny/llama"), model))
    assert not learns(build(XKV, "int4"))
    with pytest.raises(UserError, match="kvgauge fit method=kqsvd"):
        whole.new_cache(model, None)


def test_a_prefill_is_shared_unless_tokens_merge():
    assert build("kqsvd", "int4").needs.exact_prefill
    assert not build(SLIM, "int4").needs.exact_prefill
    assert not build({"method": "kqsvd", "compress_prefill": True}).needs.exact_prefill


def test_its_configuration_builds_it_again():
    method = build({**SLIM, "budget": 0.5}, "kqsvd", {"bits": 3, "group": 32}, budget=0.1)
    again = kvgauge.build_method("compose", **config(method))
    assert config(again) == config(method) and method_version(again) == method_version(method)
    assert [member.free for member in again.members.methods] == [False, True]
    other = build({**SLIM, "budget": 0.5}, "ksvd", {"bits": 3, "group": 32}, budget=0.1)
    assert config(other) != config(method) and method_version(other) != method_version(method)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "is a list of at least one member"),
        ("kqsvd", "has to be a list"),
        (["int4"], r"quantiser alone: say what it quantises, e.g. compose: \[full, int4\]"),
        (["int4", "kqsvd"], "a method that projects behind a quantiser"),
        (["kqsvd", "kvslimmer"], "a method that merges behind a method that projects"),
        (["kvslimmer", "mean_merge"], "two members that are a method that merges"),
        (["kqsvd", "xkv"], "two members that are a method that projects"),
        (["kqsvd", "int4", "int8"], "two members that are a quantiser"),
        (["kqsvd", {"bits": 5}], "bits 5 of a quantiser"),
        (["kqsvd", {"bits": 4, "grup": 3}], "unknown field of a quantiser 'grup': did you mean 'group'"),
        (["kqsvdd", "int4"], "unknown member of compose 'kqsvdd': did you mean 'kqsvd'"),
        (["kqsvd", "int5"], "unknown member of compose 'int5'"),
        (["minicache", "int4"], "minicache takes no part in compositions"),
        (["compose"], "compose"),
        ([3], "has to be text or a mapping"),
        ([{"method": "kqsvd", "rnk": 3}], "unknown field of method kqsvd 'rnk'"),
    ],
)
def test_compositions_that_cannot_be_are_one_line(members, message):
    with pytest.raises(UserError, match=message) as refusal:
        kvgauge.build_method("compose", compose=members)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("members", "budget", "message"),
    [
        (["full", "int4"], 0.1, "budget 0.1 of compose: its members take 0.3"),
        (["kqsvd", "int8"], 0.02, "budget 0.02 of compose is below what its members can reach"),
        ([SLIM, XKV, "int4"], 0.2, "every layer has merged other tokens"),
        ([{"method": "kqsvd", "compress_prefill": True}, "int4"], 0.2, "have no quantised storage"),
    ],
)
def test_what_does_not_work_says_so_before_any_work(members, budget, message, tiny, fit):
    method = build(*members, budget=budget)
    with pytest.raises(UserError, match=message) as refusal:
        method.new_cache(tiny("tiny/llama"), fit(method, "tiny/llama"), context_length=200)
    assert "\n" not in str(refusal.value)


def test_latents_of_mla_are_not_quantised(tiny, fit):
    model = tiny("tiny/deepseek_v2")
    for members in (("kqsvd", "int4"), (XKV, "int4"), ("full", "int4")):
        method = build(*members, budget=0.5)
        with pytest.raises(UserError, match=r"MLA.*leave the quantiser out"):
            method.new_cache(model, fit(method, "tiny/deepseek_v2"))


ANSWERED = {
    "full": ("full", "int8"),
    "full-int4": ("full", "int4"),
    "kqsvd": ("kqsvd", "int8"),
    "kqsvd-ends": (EXACT_ENDS, "int4"),
    "kqsvd-token": ("kqsvd", {"bits": 3, "axis": "token", "balance": False}),
    "xkv-post": ({**XKV, "rope": "post"}, "int8"),
    "xkv-post-sinks": ({**XKV, "rope": "post", "sinks": 4}, {"bits": 4, "group": 16}),
    "xkv-post-exact": ({**XKV, "rope": "post"},),
    "full-kivi": ("full", {"method": "kivi4", "residual": 32}),
    "full-turboquant": ("full", {"method": "turboquant", "bits": 3.5}),
    "full-turboquant-prod": ("full", {"method": "turboquant_prod", "key_bits": 3, "value_bits": 4}),
    "kqsvd-int4-rotated": (EXACT_ENDS, "int4_rotated"),
    "xkv-post-turboquant": ({**XKV, "rope": "post", "sinks": 4}, "turboquant"),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ANSWERED)
def test_decode_steps_take_one_compiled_pass_of_every_layer(name, padded, tiny, fit, tokens, monkeypatch):
    """The kernel answers, for every layer and step, and as torch does; nothing is dequantised on the way."""
    members = ANSWERED[name]
    budget = None if members[0] == "full" else 0.4
    method, model = build(*members, budget=budget), tiny("tiny/llama")
    fitted, ids, later = fit(method, "tiny/llama"), tokens(2, CONTEXT, seed=2), tokens(2, 3, seed=3)
    mask = torch.ones(2, CONTEXT, dtype=torch.long)
    mask[1, : 17 if padded else 0] = 0
    kernel, logits, answers = attention.stored_attention, [], []
    for compiled in (True, False):
        cache = context_cache(method, model, fitted, ids, mask if padded else None)

        def attend(*given, compiled=compiled):
            if not compiled:
                return None
            answers.append(kernel(*given))
            return answers[-1]

        monkeypatch.setattr(attention, "stored_attention", attend)
        if compiled:
            monkeypatch.setattr(BlockwiseRows, "_blocks", None)
        else:
            monkeypatch.undo()
            monkeypatch.setattr(attention, "stored_attention", attend)
        steps = []
        for index, step in enumerate(later.split(1, dim=1)):
            longer = torch.cat([mask, torch.ones(2, index + 1, dtype=torch.long)], dim=1)
            given = {"attention_mask": longer, "position_ids": longer.sum(1, keepdim=True) - 1} if padded else {}
            with torch.no_grad():
                steps.append(model(step, past_key_values=cache, **given).logits)
        logits.append(torch.cat(steps, dim=1))
    assert len(answers) == 3 * len(cache.own) and all(answer is not None for answer in answers)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
