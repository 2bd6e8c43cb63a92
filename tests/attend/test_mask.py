"""Masks of every kind: whatever is done with one, each query keeps the weights of its entries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kvgauge
from kvgauge.attend.mask import CAUSAL, Added, Counts, Mask, Seen, causal_mask

BATCH, HEADS, ENTRIES = 2, 6, 12
KINDS = ["seen", "counts", "added"]


def mask_of(kind: str, queries: int = 1, heads: int = 1) -> Mask:
    generator = torch.Generator().manual_seed(queries)
    drawn = torch.randint(0, 3, (BATCH, heads, queries, ENTRIES), dtype=torch.int32, generator=generator)
    drawn[..., 0] = 1  # every query sees something
    if kind == "counts":
        return Counts(drawn)
    if kind == "seen":
        return Seen(drawn > 0)
    return Added(torch.randn(drawn.shape, generator=generator).masked_fill(drawn == 0, torch.finfo(torch.float32).min))


def weights(mask: Mask, queries: int, entries: int = ENTRIES) -> Tensor:
    """What the exponential of a score is multiplied by, (batch or 1, heads or 1, queries, entries)."""
    tensor = mask.whole(queries, entries, torch.device("cpu")).tensor
    return tensor.double().exp() if tensor.is_floating_point() else tensor.double()


def shares(mask: Mask, scores: Tensor) -> Tensor:
    """The softmax of scores under a mask."""
    masked = scores.clone()
    mask.apply_(masked)
    return masked.softmax(dim=-1)


def expected_shares(weight: Tensor, scores: Tensor) -> Tensor:
    weighed = scores.double().exp() * weight
    return (weighed / weighed.sum(dim=-1, keepdim=True)).to(scores.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, HEADS])
def test_scores_are_weighed(kind: str, heads: int) -> None:
    mask, scores = mask_of(kind, heads=heads), torch.randn(BATCH, HEADS, 1, ENTRIES)
    torch.testing.assert_close(shares(mask, scores), expected_shares(weights(mask, 1), scores))
    assert mask.by_head == (heads > 1)


@pytest.mark.parametrize("kind", ["seen", "added"])
def test_blocks_of_queries_are_those_of_the_whole(kind: str) -> None:
    mask, scores = mask_of(kind, queries=5), torch.randn(BATCH, HEADS, 5, ENTRIES)
    whole = shares(mask, scores)
    torch.testing.assert_close(whole, expected_shares(weights(mask, 5), scores))
    parts = [shares(mask.block(start, start + 2, ENTRIES), scores[:, :, start : start + 2]) for start in (0, 2)]
    assert torch.equal(torch.cat(parts, dim=2), whole[:, :, :4])
    assert torch.equal(weights(mask.block(0, 5, 7), 5), weights(mask, 5)[..., :7])


@pytest.mark.parametrize("kind", [*KINDS, "causal"])
def test_the_bias_says_the_same_as_the_scores(kind: str) -> None:
    mask = CAUSAL if kind == "causal" else mask_of(kind)
    query, keys = torch.randn(BATCH, HEADS, 1, 8), torch.randn(BATCH, HEADS, ENTRIES, 8)
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, keys, torch.eye(ENTRIES).expand(BATCH, HEADS, -1, -1), attn_mask=mask.bias(query, ENTRIES), scale=1.0
    )
    torch.testing.assert_close(attended, shares(mask, query @ keys.mT))


@pytest.mark.parametrize("kind", ["seen", "counts"])
def test_rows_for_the_kernels(kind: str) -> None:
    mask = mask_of(kind)
    row = mask.row(BATCH, ENTRIES - 2)
    assert row is not None and mask.hides_only
    assert row.dtype == (torch.bool if kind == "seen" else torch.int32)
    assert torch.equal(row.double(), weights(mask, 1)[:, 0, 0, :-2])
    assert not mask_of("added").hides_only
    assert CAUSAL.row(BATCH, ENTRIES) is None


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_entries(kind: str) -> None:
    mask = mask_of(kind)
    assert torch.equal(
        torch.cat([weights(part, 1) for part in mask.split([3, 4, ENTRIES - 7])], dim=-1), weights(mask, 1)
    )
    assert torch.equal(weights(mask.behind(4), 1), weights(mask, 1)[..., 4:])
    assert mask.behind(0) is mask


@pytest.mark.parametrize("kind", KINDS)
def test_entries_that_differ_from_head_to_head(kind: str) -> None:
    mask = mask_of(kind)
    columns = torch.stack([torch.randperm(ENTRIES, generator=torch.Generator().manual_seed(row)) for row in range(6)])
    picked = mask.picked(columns.view(BATCH, 3, ENTRIES)[:, :, :5])
    expected = weights(mask, 1)[:, 0, 0][:, None].expand(-1, 3, -1).gather(2, columns.view(BATCH, 3, ENTRIES))
    assert torch.equal(weights(picked, 1), expected[:, :, None, :5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 3])
def test_entries_in_the_place_of_others_are_seen(kind: str, start: int) -> None:
    mask = mask_of(kind)
    replaced = weights(mask.replaced(start, 8, 2), 1, start + 2 + ENTRIES - 8)
    before = weights(mask, 1)
    expected = torch.cat([before[..., :start], torch.ones(BATCH, 1, 1, 2), before[..., 8:]], dim=-1)
    assert torch.equal(replaced, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_that_move_to_the_front(kind: str) -> None:
    mask, columns = mask_of(kind), torch.tensor([[4, 5, 6], [0, 1, 2]])
    before = weights(mask, 1)
    index = columns[:, None, None]
    expected = torch.cat([before.gather(3, index), before.scatter(3, index, 0.0)], dim=3)
    assert torch.equal(weights(mask.whole(1, ENTRIES, columns.device).led_by(columns), 1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_in_front_that_heads_see_differently(kind: str) -> None:
    mask = mask_of(kind)
    seen = torch.rand(BATCH, HEADS, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    led = mask.whole(1, ENTRIES, seen.device).led_by_seen(seen)
    expected = torch.cat([seen[:, :, None].double(), weights(mask, 1).expand(-1, HEADS, -1, -1)], dim=-1)
    assert torch.equal(weights(led, 1), expected)
    assert led.by_head


@pytest.mark.parametrize("queries", [1, 4])
def test_entries_of_several_tokens(queries: int) -> None:
    cardinalities = torch.tensor([[0, 0, 3, 1, 5, 1, 1, 1, 1], [2, 1, 1, 4, 1, 1, 1, 1, 1]], dtype=torch.int32)
    mask = Mask.of_entries(cardinalities, queries, torch.float64)
    scores = torch.randn(2, HEADS, queries, 9, dtype=torch.float64)
    causal = causal_mask(queries, 9, scores.device)
    expected = expected_shares(cardinalities[:, None, None] * causal, scores)
    torch.testing.assert_close(shares(mask, scores), expected)
    assert Mask.of_entries(None, queries, torch.float64) is CAUSAL


def test_what_the_last_query_sees() -> None:
    for kind in ("seen", "added"):
        mask = mask_of(kind, queries=3)
        assert torch.equal(mask.seen_by_last(ENTRIES), weights(mask, 3)[:, 0, -1] > 0)
    counts = mask_of("counts")
    assert torch.equal(counts.seen_by_last(ENTRIES), weights(counts, 1)[:, 0, -1] > 0)
    assert CAUSAL.seen_by_last(ENTRIES) is None


@pytest.mark.parametrize("kind", ["boolean", "integer", "added"])
@torch.no_grad()
def test_masks_of_four_dimensions_hide_padding_alike(kind: str, tiny, fit, tokens) -> None:
    """Whoever spells the mask out may do so in any of the forms that transformers lets through."""
    model, ids = tiny("tiny/llama"), tokens(2, 40)
    method = kvgauge.build_method("kqsvd", rank=6, sinks=4)
    fitted = fit(method, "tiny/llama")
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, :9] = False
    positions = (valid.cumsum(dim=1) - 1).clamp(min=0)

    def logits(mask: Tensor, later: Tensor) -> Tensor:
        cache = method.new_cache(model, fitted)
        model(ids[:, :39], attention_mask=mask, position_ids=positions[:, :39], past_key_values=cache)
        cache.compress()
        assert cache.valid is not None and torch.equal(cache.valid, valid[:, :39])
        step = model(ids[:, 39:], attention_mask=later, position_ids=positions[:, 39:], past_key_values=cache)
        return step.logits

    def spelt_out(queries: int, upto: int) -> Tensor:
        seen = causal_mask(queries, upto, ids.device) & valid[:, None, None, :upto]
        if kind == "added":
            return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return seen if kind == "boolean" else seen.long()

    torch.testing.assert_close(
        logits(spelt_out(39, 39), spelt_out(1, 40)), logits(valid[:, :39], valid), rtol=1e-4, atol=1e-4
    )
