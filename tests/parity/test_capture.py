"""A decode step asks nothing back from the device: it could be captured, and a GPU would not wait for the host."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import kvgauge
from kvgauge.evaluation.decoding import prefill
from kvgauge.store.buffers import GrowingBuffer

CONTEXT = 256
# Operators that read a number back, or whose result has a shape that depends on the data.
WAITING = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
}
INDEXING = {"index", "index_put", "index_put_"}


def _is_mask(index):
    return index is not None and index.dtype == torch.bool


class Operators(TorchDispatchMode):
    """Counts the operators that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITING or (name in INDEXING and any(_is_mask(index) for index in args[1])):
            self.waiting.append(name)
        return func(*args, **(kwargs or {}))


def test_the_meter_sees_what_waits():
    number = torch.ones(3)
    with Operators() as operators:
        float(number.sum())
        number[number > 0]
        number[torch.tensor([True, False, True])] = 2.0
        torch.nonzero(number)
    assert sorted(operators.waiting) == ["_local_scalar_dense", "index", "index_put_", "nonzero"]


# One question a step, for all layers: do running positions differ from the model's?
MERGING = {"asymkv", "kvslimmer", "mean_merge", "streaming_llm"}


@pytest.mark.parametrize("name", kvgauge.list_methods())
@torch.no_grad()
def test_decode_steps_do_not_wait_for_the_device(name, tiny, fit, tokens):
    model = tiny("tiny/llama")
    method = kvgauge.build_method(name)
    cache = method.new_cache(model, fit(method, "tiny/llama"))
    cache.expect(CONTEXT)
    prefill(model, tokens(2, CONTEXT), cache)
    cache.compress()
    for step in range(3):
        with Operators() as operators:
            model(torch.full((2, 1), 5 + step), past_key_values=cache, use_cache=True)
        if name in MERGING:
            assert operators.waiting == ["_local_scalar_dense"]
        else:
            assert operators.waiting == []


@pytest.mark.parametrize("name", ["full", "kqsvd"])
@torch.no_grad()
def test_a_decode_step_is_one_graph(name, tiny, fit, tokens):
    model = tiny("tiny/llama")
    method = kvgauge.build_method(name)
    caches = [method.new_cache(model, fit(method, "tiny/llama")) for _ in range(2)]
    for cache in caches:
        prefill(model, tokens(2, CONTEXT), cache)
        cache.compress()
    torch._dynamo.reset()
    captured = torch.compile(model.forward, fullgraph=True, dynamic=True, backend="eager")
    for step in range(2):
        token = torch.full((2, 1), 5 + step)
        expected, logits = (
            forward(token, past_key_values=cache, use_cache=True).logits
            for forward, cache in zip((model, captured), caches, strict=True)
        )
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


# What a GPU can replay as one graph: every step writes one row of buffers that are as long as they will be.
STATIC = {
    "full": ("full", {}),
    "per-head latents": ("kqsvd", {"budget": 0.5, "sinks": 4}),
    "xkv": ("xkv", {"budget": 0.5}),
    "xkv post": ("xkv", {"budget": 0.5, "rope": "post", "sinks": 2}),
    "xkv sr": ("xkv", {"budget": 0.5, "sr": {"chunk": 16, "budget": 64}}),
    "minicache": ("minicache", {"budget": 0.9}),
    "merged entries": ("kvslimmer", {"budget": 0.5, "window": 128}),
    "streaming_llm": ("streaming_llm", {"budget": 0.5, "window": 128}),
    "merged latents": ("compose", {"compose": [{"method": "kvslimmer", "window": 128}, "kqsvd"], "budget": 0.3}),
    "int8 latents": ("compose", {"compose": ["kqsvd", {"bits": 8, "axis": "token"}], "budget": 0.25}),
    "snapkv": ("kvpress/snapkv", {"budget": 0.5}),
}
STEPS = 4


def _places(layer):
    buffers = [buffer for buffer in layer.buffers() if isinstance(buffer, GrowingBuffer) and len(buffer)]
    return [(buffer.view().data_ptr(), buffer.view().shape) for buffer in buffers]


def _filled(case, tiny, fit, tokens, mask):
    name, options = STATIC[case]
    method, model = kvgauge.build_method(name, **options), tiny("tiny/llama")
    cache = method.new_cache(model, fit(method, "tiny/llama"))
    ids = tokens(2, CONTEXT + 7)
    prefill(model, ids[:, :CONTEXT], cache, mask=None if mask is None else mask[:, :CONTEXT])
    cache.compress()
    prefill(model, ids[:, CONTEXT:], cache, mask=None if mask is None else mask[:, : CONTEXT + 7])
    return model, cache


PADDED = ("full", "xkv", "merged latents")


@pytest.mark.parametrize(("case", "padded"), [*((case, False) for case in STATIC), *((case, True) for case in PADDED)])
@torch.no_grad()
def test_steps_of_one_shape_are_one_graph(case, padded, tiny, fit, tokens):
    """Traced once, without dynamic shapes; three more steps run what was traced, and answer as steps that grow do."""
    total, mask = CONTEXT + 7, None
    if padded:
        mask = torch.ones(2, total + STEPS + 1, dtype=torch.bool)
        mask[1, :19] = False
    model, growing = _filled(case, tiny, fit, tokens, mask)
    _, fixed = _filled(case, tiny, fit, tokens, mask)
    fixed.fix_shapes(STEPS + 1)
    places = [_places(layer) for layer in fixed.own]
    torch._dynamo.reset()
    graphs = CompileCounter()
    captured = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=graphs)
    steps = tokens(2, STEPS, seed=9)
    for step in range(STEPS):
        now = total + step
        positions = torch.tensor([[now], [now - 19 if padded else now]])
        asked = {"input_ids": steps[:, step : step + 1], "position_ids": positions, "use_cache": True}
        expected = model(past_key_values=growing, attention_mask=None if mask is None else mask[:, : now + 1], **asked)
        logits = captured(past_key_values=fixed, attention_mask=mask, **asked).logits
        torch.testing.assert_close(logits, expected.logits, rtol=1e-3, atol=1e-4)
        assert int(fixed.get_seq_length()) == now + 1
    assert graphs.frame_count == 1
    assert [_places(layer) for layer in fixed.own] == places  # nothing was allocated anew
    assert fixed.release_shapes() == STEPS and fixed.get_seq_length() == total + STEPS
    last = {"input_ids": steps[:, :1], "position_ids": positions + 1}
    seen = None if mask is None else mask[:, : total + STEPS + 1]
    grown, released = (model(past_key_values=cache, attention_mask=seen, **last).logits for cache in (growing, fixed))
    torch.testing.assert_close(released, grown, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("kvquant", {"bits": 3}, "no one graph"),
        ("kqsvd", {"budget": 0.5, "window": 16}, "no one graph"),
        ("xkv", {"budget": 0.5, "fold_every": 8}, "no one graph"),
        ("kvslimmer", {"budget": 0.5, "window": 32, "start": 4}, "merges after 32 more tokens"),
        ("quantized_cache", {"bits": 4}, "no one graph"),
    ],
)
@torch.no_grad()
def test_steps_of_many_shapes_say_so(name, options, said, tiny, fit, tokens):
    method, model = kvgauge.build_method(name, **options), tiny("tiny/llama")
    cache = method.new_cache(model, fit(method, "tiny/llama"))
    prefill(model, tokens(1, CONTEXT), cache)
    with pytest.raises(kvgauge.UserError, match="compress"):
        cache.fix_shapes(8)
    cache.compress()
    with pytest.raises(kvgauge.UserError, match=said):
        cache.fix_shapes(40)
    model(tokens(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == CONTEXT + 1
