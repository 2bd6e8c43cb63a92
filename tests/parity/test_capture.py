"""A decode step asks nothing back from the device: it could be captured, and a GPU would not wait for the host."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvgauge
from kvgauge.evaluation.decoding import prefill

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


# One question a step, for all layers: do running positions differ from the model's? Outliers are as many as there are.
MERGING = {"asymkv", "kvslimmer", "mean_merge", "streaming_llm"}
SPARSE = {"kvquant"}


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
        elif name in SPARSE:
            assert "_local_scalar_dense" not in operators.waiting
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
