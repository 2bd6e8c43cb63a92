"""AsymKV's gradients, against autograd through an ordinary cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

import kvgauge
from kvgauge import UserError
from kvgauge.architecture.rotary import Rotary
from kvgauge.evaluation.decoding import prefill
from kvgauge.layers import others
from kvgauge.methods.merging.gradient_entries import GradientEntries
from kvgauge.methods.merging.gradient_merged import GradientMergingCache

WINDOW = 16


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return kvgauge.load_model("tiny/llama")[0]


def cache_of(model: PreTrainedModel, **options: Any) -> GradientMergingCache:
    options = {"start": 2, "window": WINDOW, "budget": None} | options
    cache = kvgauge.build_method("asymkv", **options).new_cache(model)
    assert isinstance(cache, GradientMergingCache)
    return cache


def reference_gradients(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Gradients of the loss of the second window in the rotated keys of the first, by a DynamicCache."""
    past = DynamicCache()
    with torch.no_grad():
        model(ids[:, :WINDOW], past_key_values=past)
    keys = []
    for layer in past.layers:
        layer.keys = layer.keys.detach().requires_grad_()
        keys.append(layer.keys)
    logits = model(ids[:, WINDOW:], past_key_values=past).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, WINDOW:][:, 1:].flatten(), reduction="mean")
    return list(torch.autograd.grad(loss, keys))


def test_the_gradients_are_those_of_the_loss_of_the_window(model: PreTrainedModel) -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (1, 2 * WINDOW))
    # 17 entries: the first window does not merge, the second will, so that its gradients are taken
    cache = cache_of(model, max_entries=2 * WINDOW - 1)
    prefill(model, ids[:, :WINDOW], cache)
    assert cache.gradient_windows == 1
    for layer in cache.layers:
        layer.merging.held.hessian.clear()
    taken: list[Tensor] = []
    original = GradientEntries.take_gradient

    def keep(self: GradientEntries, gradient: Tensor) -> None:
        original(self, gradient)
        taken.append(self.held.hessian.view().clone())

    GradientEntries.take_gradient = keep  # type: ignore[method-assign]
    try:
        prefill(model, ids[:, WINDOW:], cache)
    finally:
        GradientEntries.take_gradient = original  # type: ignore[method-assign]
    assert len(taken) == len(cache.layers)
    rotary, positions = Rotary(model), torch.arange(WINDOW)[None]
    for mine, reference in zip(taken, reference_gradients(model, ids), strict=True):
        plain = rotary.unrotate(reference, positions)
        torch.testing.assert_close(mine[:, :, :WINDOW], plain.square(), rtol=1e-3, atol=1e-9)


def test_every_window_that_merges_has_a_backward_pass(model: PreTrainedModel) -> None:
    torch.manual_seed(1)
    ids = torch.randint(3, 300, (2, 5 * WINDOW + 3))
    cache = cache_of(model, max_entries=40)
    prefill(model, ids, cache)
    cache.compress()
    assert cache.gradient_windows == 5  # the first starts the statistics, the second cannot merge, the tail may
    assert cache.guard_counts == [0] * 4
    assert all(not weight.requires_grad for weight in model.parameters())


def test_no_gradient_no_graph_is_left(model: PreTrainedModel) -> None:
    ids = torch.randint(3, 300, (1, 3 * WINDOW))
    cache = cache_of(model, max_entries=20)
    logits = prefill(model, ids, cache)
    assert not logits.requires_grad
    for layer in cache.layers:
        assert layer.merging.recorded is None
        assert not layer.merging.held.keys.view().requires_grad


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [3 * WINDOW, 3 * WINDOW + 5])
def test_a_cache_that_compresses_by_itself_does_so_after_the_backward_pass(
    model: PreTrainedModel, batch: int, tokens: int
) -> None:
    ids = torch.randint(3, 300, (batch, tokens + 3), generator=torch.Generator().manual_seed(2))
    logits, caches = [], []
    for context_length in (None, tokens):
        cache = kvgauge.build_method("asymkv", start=2, window=WINDOW, budget=None, max_entries=20).new_cache(
            model, context_length=context_length
        )
        cache.expect(tokens)
        prefill(model, ids[:, :tokens], cache)
        if context_length is None:
            cache.compress()
        assert cache.compressed and cache.physical_length() == 20
        logits.append(prefill(model, ids[:, tokens:], cache))
        caches.append(cache)
    assert caches[1].remarks() == caches[0].remarks()
    assert torch.equal(logits[1], logits[0])


@pytest.mark.parametrize("name", ["cohere", "glm", "phi"])
def test_rows_of_a_padded_batch_stand_in_the_frame_of_their_layers(name: str, attached) -> None:
    """Models whose rotation is not one of halves: what a row learns by itself must be of the same keys."""
    model = attached(name)
    ids = torch.randint(3, 300, (2, 6 * WINDOW), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :20] = False

    def logits(rows: Tensor, known: Tensor | None) -> Tensor:
        cache, context = cache_of(model, max_entries=24), rows.shape[1] - 5
        prefill(model, rows[:, :context], cache, mask=None if known is None else known[:, :context])
        cache.compress()
        return prefill(model, rows[:, context:], cache, mask=known)

    together = logits(ids, mask)
    torch.testing.assert_close(together[:1], logits(ids[:1, 20:], None), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together[1:], logits(ids[1:], None), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_states_that_are_written_in_place_are_refused(name: str, attached) -> None:
    model = attached(name)
    ids = torch.randint(3, 300, (1, 3 * WINDOW))
    with pytest.raises(UserError, match="states of linear attention") as refusal:
        prefill(model, ids, cache_of(model, max_entries=24))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["gemma3", "llama4"])
def test_windows_that_are_left_to_transformers_keep_no_graph_and_know_no_rows(name: str, attached) -> None:
    model = attached(name)
    ids = torch.randint(3, 300, (2, 6 * WINDOW), generator=torch.Generator().manual_seed(4))
    cache = cache_of(model, max_entries=24)
    prefill(model, ids, cache)
    assert cache.gradient_windows > 2
    held = [tensor for layer in cache.others() for tensor in others.tensors(layer)]
    assert held and not any(tensor.requires_grad for tensor in held)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :20] = False
    with pytest.raises(UserError, match="batch_size=1") as refusal:
        prefill(model, ids, cache_of(model, max_entries=24), mask=mask)
    assert "\n" not in str(refusal.value)


def test_inference_only_weights_are_one_line(model: PreTrainedModel) -> None:
    ids = torch.randint(3, 300, (1, 3 * WINDOW))
    with torch.inference_mode(), pytest.raises(UserError, match="for inference only") as raised:
        prefill(model, ids, cache_of(model, max_entries=20))
    assert "\n" not in str(raised.value)
    with torch.inference_mode():
        frozen = kvgauge.load_model("tiny/llama")[0]
    with pytest.raises(UserError, match="for inference only"):
        prefill(frozen, ids, cache_of(model, max_entries=20))
