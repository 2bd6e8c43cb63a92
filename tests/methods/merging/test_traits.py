"""What the published codes do otherwise, trait by trait, on cases small enough to do by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvgauge
from kvgauge import UserError
from kvgauge.architecture.rotary import Rotary
from kvgauge.evaluation.decoding import prefill
from kvgauge.methods.merging.gradient_entries import GradientEntries
from kvgauge.methods.merging.merge_entries import (
    Entries,
    current_hessian,
    drop_overlaps,
    merge,
    running_positions,
)
from kvgauge.methods.merging.merging import Merging
from kvgauge.methods.merging.merging_cache import MergingCache
from kvgauge.methods.merging.merging_entries import MergingEntries
from kvgauge.methods.merging.positions import NewTokens, RunningPositions
from kvgauge.methods.merging.tally import Tally
from kvgauge.methods.merging.windows import Windows

METHODS = ["kvslimmer", "asymkv", "mean_merge"]
DIM, WINDOW, START = 16, 8, 2


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return kvgauge.load_model("tiny/llama")[0]


@pytest.fixture(scope="module")
def rotary(model: PreTrainedModel) -> Rotary:
    return Rotary(model)


def entries(count: int, **fields: Any) -> Entries:
    torch.manual_seed(0)
    keys, values = (torch.randn(1, 2, count, DIM) for _ in range(2))
    shares = torch.rand(1, 2, count)
    return Entries(keys, values, torch.ones(1, count, dtype=torch.int32), shares, **fields)


def chosen(count: int, *places: int) -> Tensor:
    mask = torch.zeros(1, count - 1, dtype=torch.bool)
    mask[:, list(places)] = True
    return mask


def merging(name: str, **options: Any) -> Merging:
    method = kvgauge.build_method(name, **{"start": START, "window": WINDOW, "budget": None} | options)
    assert isinstance(method, Merging)
    return method


def cache_of(model: PreTrainedModel, name: str, **options: Any) -> MergingCache:
    return merging(name, **options).new_cache(model)


# -- overlaps ----------------------------------------------------------------------------------------------------------


def test_of_a_run_the_first_two_are_merged_and_the_others_vanish(rotary: Rotary) -> None:
    before = entries(7)
    plain = rotary.unrotate(before.keys, before.positions)
    kept, pairs = drop_overlaps(before, chosen(7, 1, 2, 3, 5), rotary)
    assert kept.cardinalities.tolist() == [[1, 1, 1, 1, 1]]  # 3 and 4 are gone
    assert pairs.tolist() == [[False, True, False, True]]
    after, merges, _ = merge(kept, pairs, "mean", 5, rotary)
    assert after.cardinalities.tolist() == [[1, 2, 2]]
    assert merges.tolist() == [2 * 2]
    torch.testing.assert_close(after.values[:, :, 1] * 2, before.values[:, :, 1] + before.values[:, :, 2])
    torch.testing.assert_close(after.values[:, :, 2] * 2, before.values[:, :, 5] + before.values[:, :, 6])
    merged = rotary.unrotate(after.keys, after.positions)
    torch.testing.assert_close(merged[:, :, 1], plain[:, :, 1:3].mean(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged[:, :, 2], plain[:, :, 5:].mean(2), rtol=1e-4, atol=1e-5)


def test_every_chosen_pair_removes_one_entry_whatever_the_overlaps(rotary: Rotary) -> None:
    torch.manual_seed(3)
    for _ in range(20):
        before = entries(30)
        before.cardinalities[0, :3] = 0
        pairs = (torch.rand(1, 29) < 0.5) & before.valid[:, :-1]
        after, _, _ = merge(*drop_overlaps(before, pairs, rotary), "mean", 5, rotary)
        assert int(after.valid.sum()) == 27 - int(pairs.sum())
        assert int(after.cardinalities.max()) <= 2


# -- positions ---------------------------------------------------------------------------------------------------------


def test_an_entry_stands_at_its_first_or_at_its_last_token() -> None:
    cardinalities = torch.tensor([[0, 1, 3, 1, 2]])
    assert running_positions(cardinalities).tolist() == [[0, 0, 1, 4, 5]]
    assert running_positions(cardinalities, at_end=True).tolist() == [[0, 0, 3, 4, 6]]


def test_keys_merge_to_the_position_of_the_last_token(rotary: Rotary) -> None:
    before = entries(6, at_end=True)
    plain = rotary.unrotate(before.keys, before.positions)
    after, _, _ = merge(before, chosen(6, 1, 2), "mean", None, rotary)
    assert after.positions.tolist() == [[0, 3, 4, 5]]
    merged = rotary.unrotate(after.keys, torch.tensor([[0, 3, 4, 5]]))
    torch.testing.assert_close(merged[:, :, 1], plain[:, :, 1:4].mean(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged[:, :, 2:], plain[:, :, 4:], rtol=1e-4, atol=1e-5)


# -- curvature ---------------------------------------------------------------------------------------------------------


def test_published_curvature_by_hand(rotary: Rotary) -> None:
    """α over the entries behind the start, δ of summed values, in float64, and the merged key that follows."""
    made = entries(5, behind=torch.tensor([2]))
    made.cardinalities = torch.tensor([[1, 1, 2, 1, 3]], dtype=torch.int32)
    made.hessian = current_hessian(made)
    shares = made.shares[0, :, 2:].double()
    alpha = shares / shares.sum(-1, keepdim=True)
    sums = made.values[0, :, 2:].double() * torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)[:, None]
    delta = (sums - (alpha[..., None] * sums).sum(1, keepdim=True)).abs().sum(-1)
    diagonal = alpha * (1 - 2 * alpha) * delta
    torch.testing.assert_close(made.hessian[0, :, 2:, 0].double(), diagonal, rtol=1e-5, atol=1e-6)
    assert not made.hessian[0, :, :2].any()
    off = -alpha[:, 0] * alpha[:, 1] * (delta[:, 0] + delta[:, 1])
    first, second = diagonal[:, 0] + off, diagonal[:, 1] + off
    plain = rotary.unrotate(made.keys, made.positions).double()
    expected = (first[:, None] * plain[0, :, 2] + second[:, None] * plain[0, :, 3]) / (first + second)[:, None]
    after, _, guarded = merge(made, chosen(5, 2), "hessian", 5, rotary)
    usable = (first + second) > 1e-3 * (first.abs() + second.abs())
    assert guarded.tolist() == [int((~usable).sum())]
    found = rotary.unrotate(after.keys, after.positions)[0, :, 2].double()
    torch.testing.assert_close(found[usable], expected[usable], rtol=1e-3, atol=1e-4)


def test_gradients_are_squared_after_their_average_and_added_in_a_merge(rotary: Rotary) -> None:
    before = entries(4)
    before.hessian = torch.randn(1, 2, 4, DIM)
    g1, g2 = before.hessian[:, :, 1], before.hessian[:, :, 2]
    plain = rotary.unrotate(before.keys, before.positions)
    after, _, _ = merge(before, chosen(4, 1), "gradient", 5, rotary)
    assert after.hessian is not None
    torch.testing.assert_close(after.hessian[:, :, 1], g1 + g2)
    expected = (g1**2 * plain[:, :, 1] + g2**2 * plain[:, :, 2]) / (g1**2 + g2**2)
    found = rotary.unrotate(after.keys, after.positions)[:, :, 1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def gradient_entries(model: PreTrainedModel, curvature: str) -> GradientEntries:
    method = merging("asymkv", max_entries=50, curvature=curvature)
    policy = method.policy(kvgauge.architecture.facts.model_facts(model))
    made = GradientEntries(policy, Windows(WINDOW, lambda: [50]), RunningPositions(Rotary(model)), Tally())
    made.windows.begin(1)
    made.positions.begin([0])
    made.append(torch.zeros(1, 2, 4, DIM), torch.zeros(1, 2, 4, DIM), None)
    return made


def test_gradients_that_cancel_leave_nothing_where_squares_leave_their_mean(model: PreTrainedModel) -> None:
    gradient = torch.randn(1, 2, 4, DIM, generator=torch.Generator().manual_seed(1))
    squares = gradient_entries(model, "output")
    signed = gradient_entries(model, "published")
    signed.tally.merges = 1  # else every window begins anew
    for made in (squares, signed):
        made.take_gradient(gradient)
        made.take_gradient(-gradient)
    assert float(signed.held.hessian.view().abs().max()) < 1e-6
    plain = Rotary(model).shift(gradient, -torch.arange(4)[None])
    torch.testing.assert_close(squares.held.hessian.view(), plain.square(), rtol=1e-4, atol=1e-6)
    anew = gradient_entries(model, "published")
    anew.take_gradient(gradient)
    anew.take_gradient(-gradient)
    torch.testing.assert_close(anew.held.hessian.view(), -plain, rtol=1e-4, atol=1e-6)


# -- who decides -------------------------------------------------------------------------------------------------------


def test_the_next_windows_queries_choose_the_pair(model: PreTrainedModel) -> None:
    """One pair too many: the one that the float64 attention of the next window's queries makes the cheapest."""
    method = merging("mean_merge", max_entries=WINDOW - 1, decided_by="next", gamma=1e9)
    policy = method.policy(kvgauge.architecture.facts.model_facts(model))
    generator = torch.Generator().manual_seed(5)

    def random(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, DIM, generator=generator)

    keys, values, new_keys = random(2, WINDOW), random(2, WINDOW), random(2, WINDOW)
    own, query = random(4, WINDOW), random(4, WINDOW)
    made = MergingEntries(policy, Windows(WINDOW, lambda: [WINDOW - 1]), RunningPositions(Rotary(model)), Tally())
    made.windows.begin(1)
    made.positions.begin([0])
    made.append(keys, values, None)
    made.attend(own, 0.25)
    made.end_windows()
    assert len(made) == WINDOW  # its own queries decide nothing
    made.look_ahead(query, new_keys, NewTokens(), 0.25)
    assert len(made) == WINDOW - 1

    grouped = query.double().unflatten(1, (2, 2))
    every = torch.cat([keys, new_keys], dim=2).double()[:, :, None]
    scores = grouped @ every.mT * 0.25
    later = torch.ones(WINDOW, WINDOW, dtype=torch.bool).triu(1)
    scores[..., WINDOW:] = scores[..., WINDOW:].masked_fill(later, -torch.inf)
    received = scores.softmax(-1)[..., :WINDOW].sum(dim=(0, 1, 2, 3))
    cost = received[START:-1] + received[START + 1 :]
    place = START + int(cost.argmin())
    counts = [1] * (WINDOW - 1)
    counts[place] = 2
    assert made.held.cardinalities is not None
    assert made.held.cardinalities.tolist() == [counts]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("tokens", "newest"), [(5 * WINDOW, WINDOW), (5 * WINDOW + 3, 3)])
def test_the_newest_window_stands_outside_the_limit_and_is_never_merged(
    model: PreTrainedModel, name: str, tokens: int, newest: int
) -> None:
    ids = torch.randint(3, 300, (1, tokens), generator=torch.Generator().manual_seed(7))
    cache = cache_of(model, name, recent=10, published=True)
    prefill(model, ids, cache)
    cache.compress()
    for layer in cache.own:
        assert len(layer.entries) == START + 10 + newest
        counts = layer.entries.held.cardinalities
        assert counts[0, -newest:].tolist() == [1] * newest
        assert int(counts.max()) > 1
        assert layer.tally.most_entries <= START + 10 + WINDOW
    method = merging(name, recent=10, published=True)
    facts = kvgauge.architecture.facts.model_facts(model)
    assert method.entries(tokens, facts) == START + 10 + newest
    assert cache.nbytes() == method.nbytes(facts, None, tokens)


@pytest.mark.parametrize("name", METHODS)
def test_published_bytes_meet_a_budget_with_the_newest_window_counted(model: PreTrainedModel, name: str) -> None:
    ids = torch.randint(3, 300, (1, 301), generator=torch.Generator().manual_seed(8))
    cache = cache_of(model, name, budget=0.4, published=True, window=64)
    cache.expect(301)
    prefill(model, ids, cache)
    cache.compress()
    full = kvgauge.full_nbytes(model, 301)
    assert 0.37 * full < cache.nbytes() <= 0.4 * full


def test_a_window_that_the_budget_cannot_pay_for_is_one_line(model: PreTrainedModel) -> None:
    cache = cache_of(model, "kvslimmer", budget=0.2, published=True, window=64)
    cache.expect(256)
    ids = torch.randint(3, 300, (1, 256))
    with pytest.raises(UserError, match="the 64 tokens of the last window: lower start or window") as raised:
        prefill(model, ids, cache)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_padded_batch_answers_as_its_rows_do_when_published(model: PreTrainedModel, name: str) -> None:
    context, question, pad = 70, 6, 13
    ids = torch.randint(3, 300, (2, context + question), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :pad] = False

    def answer(rows: Tensor, known: Tensor | None, tokens: int) -> Tensor:
        cache = cache_of(model, name, recent=20, published=True)
        prefill(model, rows[:, :tokens], cache, mask=None if known is None else known[:, :tokens])
        cache.compress()
        return prefill(model, rows[:, tokens:], cache, mask=known)

    together = answer(ids, mask, context)
    torch.testing.assert_close(together[:1], answer(ids[:1, pad:], None, context - pad), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together[1:], answer(ids[1:], None, context), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_published_steps_go_on_after_the_context(model: PreTrainedModel, name: str) -> None:
    ids = torch.randint(3, 300, (1, 4 * WINDOW), generator=torch.Generator().manual_seed(2))
    cache = cache_of(model, name, recent=6, published=True)
    prefill(model, ids, cache)
    cache.compress()
    before = cache.physical_length()
    model.generate(ids, past_key_values=cache, max_new_tokens=1)
    for step in range(3 * WINDOW):
        prefill(model, ids[:, step : step + 1], cache)
    assert cache.physical_length() <= before + WINDOW


# -- bounded chains ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "largest"), [(40, 5), (12, 13)])
def test_bounded_chains_keep_to_the_clip_while_that_reaches_the_limit(
    model: PreTrainedModel, limit: int, largest: int
) -> None:
    ids = torch.randint(3, 300, (1, 120), generator=torch.Generator().manual_seed(3))
    cache = cache_of(model, "kvslimmer", max_entries=limit, pairs="bounded", clip=5, window=120)
    prefill(model, ids, cache)
    cache.compress()
    for layer in cache.own:
        counts = layer.entries.held.cardinalities
        assert int(counts.max()) == 5
        lost = 120 - int(counts.sum())  # tokens whose values are kept and whose count is not
        assert (lost == 0) == (largest == 5)


# -- options -----------------------------------------------------------------------------------------------------------


def test_published_sets_every_trait() -> None:
    method = merging("kvslimmer", max_entries=50, published=True)
    one_by_one = merging(
        "kvslimmer",
        max_entries=50,
        pairs="drop",
        cost="attention",
        decided_by="next",
        position="last",
        curvature="published",
    )
    assert method.traits == one_by_one.traits
    assert merging("asymkv", max_entries=50, published=True).traits.cost == "cardinality"
    assert merging("asymkv", max_entries=50, published=True).curved_rule == "gradient"
    assert merging("kvslimmer", max_entries=50).traits.decided_by == "own"


def test_chains_have_no_clip_unless_they_are_given_one_and_published_ones_have_the_codes() -> None:
    assert merging("kvslimmer", max_entries=50).largest_cardinality is None
    assert merging("kvslimmer", max_entries=50, clip=3).largest_cardinality == 3
    assert merging("kvslimmer", max_entries=50, published=True).largest_cardinality == 5


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"published": True, "pairs": "chain"}, "sets pairs of .* to drop, and pairs is chain"),
        ({"published": True, "decided_by": "own"}, "sets decided_by of .* to next"),
        ({"published": True, "position": "first"}, "sets position of .* to last"),
        ({"published": True, "cost": "residual"}, "sets cost of"),
        ({"published": True, "clip": 3}, "sets clip of .* to 5, and clip is 3"),
        ({"pairs": "bounded"}, "no clip: give a clip"),
        ({"cost": "residual", "gamma": 10.0}, "is not discounted"),
        ({"cost": "residuals"}, "did you mean 'residual'"),
        ({"decided_by": "nxt"}, "did you mean 'next'"),
        ({"position": "frist"}, "did you mean 'first'"),
        ({"curvature": "publish"}, "did you mean 'published'"),
    ],
)
def test_contradictory_options_are_one_line(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        merging(name, **{"max_entries": 50} | options)
    assert "\n" not in str(raised.value)


def test_plain_averages_have_no_curvature() -> None:
    with pytest.raises(UserError, match="whatever the curvature"):
        merging("mean_merge", max_entries=50, curvature="output")
