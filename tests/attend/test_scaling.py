"""Capped scores and sink logits, in every way that attention is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kvgauge.architecture.scaling import Scaling
from kvgauge.attend.attention import ExactSegment, attention_forward, exact_attention, segmented_attention
from kvgauge.attend.counted_attention import counted_attention
from kvgauge.attend.mask import CAUSAL, Counts, Mask, causal_mask
from kvgauge.errors import UserError
from kvgauge.kernels.cpu.decode_attention import applies, decode_attention

BATCH, HEADS, KV_HEADS, DIM, TOKENS = 2, 6, 3, 8, 70
SINKS = torch.tensor([-1.0, 0.5, 3.0, 0.0, 1.5, -20.0])
RULES = {
    "cap": Scaling(0.8, softcap=2.0),
    "sinks": Scaling(0.8, sinks=SINKS),
    "both": Scaling(0.8, softcap=2.0, sinks=SINKS),
}


def tensors(queries: int, dtype: torch.dtype = torch.float32, *, side_by_side: bool = False) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(queries)
    query = torch.randn(BATCH, HEADS, queries, DIM, generator=generator).to(dtype)
    keys, values = (torch.randn(BATCH, KV_HEADS, TOKENS, DIM, generator=generator).to(dtype) for _ in range(2))
    if side_by_side:  # as the compiled kernel wants them
        keys, values = keys.mT.contiguous().mT, values.mT.contiguous().mT
    return query, keys, values


def dense(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, rules: Scaling) -> tuple[Tensor, Tensor]:
    """The formula in float64: output, and weights (batch, heads, queries, tokens). The mask counts tokens."""
    query, keys, values = query.double(), keys.double(), values.double()
    keys, values = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (keys, values))
    scores = query @ keys.mT * float(rules)
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    exponentials = scores.exp() * mask
    normaliser = exponentials.sum(-1, keepdim=True)
    if rules.sinks is not None:
        normaliser = normaliser + rules.sinks.double().exp()[:, None, None]
    weights = exponentials / normaliser
    return (weights @ values).transpose(1, 2), weights


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("queries", [1, 7, TOKENS])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_attention_is_the_formula(rules: str, queries: int, side_by_side: bool) -> None:
    query, keys, values = tensors(queries, side_by_side=side_by_side)
    mask = causal_mask(queries, TOKENS, query.device).expand(BATCH, 1, -1, -1).clone()
    mask[1, ..., :11] = False
    expected, _ = dense(query, keys, values, mask, RULES[rules])
    seen = mask.any(dim=-1)[:, 0]
    found = exact_attention(query, keys, values, Mask.of(mask), RULES[rules])
    torch.testing.assert_close(found.double()[seen], expected[seen], atol=2e-6, rtol=2e-5)
    cuts = (9, 40, TOKENS - 49)
    pairs = zip(keys.split(cuts, dim=2), values.split(cuts, dim=2), strict=True)
    parts = [ExactSegment(one, other) for one, other in pairs]
    found = segmented_attention(query, parts, Mask.of(mask), RULES[rules])
    torch.testing.assert_close(found.double()[seen], expected[seen], atol=2e-6, rtol=2e-5)
    plain, _ = dense(query, keys, values, causal_mask(queries, TOKENS, query.device), RULES[rules])
    torch.testing.assert_close(
        exact_attention(query, keys, values, CAUSAL, RULES[rules]).double(), plain, atol=2e-6, rtol=2e-5
    )


@pytest.mark.parametrize("rules", RULES)
def test_entries_that_stand_for_several_tokens(rules: str) -> None:
    query, keys, values = tensors(1, side_by_side=True)
    counts = torch.randint(0, 4, (BATCH, 1, 1, TOKENS), dtype=torch.int32)
    expected, _ = dense(query, keys, values, counts, RULES[rules])
    found = exact_attention(query, keys, values, Counts(counts), RULES[rules])
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_column_sums_are_those_of_the_formula(rules: str, queries: int, side_by_side: bool) -> None:
    query, keys, values = tensors(queries, side_by_side=side_by_side)
    counts = torch.randint(1, 4, (BATCH, TOKENS), dtype=torch.int32)
    mask = causal_mask(queries, TOKENS, query.device) * counts[:, None, None]
    expected, weights = dense(query, keys, values, mask, RULES[rules])
    output, sums = counted_attention(query, keys, values, counts, RULES[rules])
    torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=2e-5)
    columns = weights.sum(dim=2).unflatten(1, (KV_HEADS, -1)).sum(dim=2)
    torch.testing.assert_close(sums.double(), columns, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_caps_scores_and_leaves_sinks_to_the_join(dtype: torch.dtype) -> None:
    query, keys, values = tensors(1, dtype, side_by_side=True)
    grouped = query.reshape(BATCH, KV_HEADS, -1, DIM)
    if not applies(grouped, keys, values):
        pytest.skip("no compiled kernels on this machine")
    fused = decode_attention(grouped, keys, values, RULES["both"])
    assert fused is not None
    expected, _ = dense(query, keys, values, torch.ones(1), RULES["cap"])
    close = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(fused[0].double().flatten(1, 2)[:, None], expected, atol=close, rtol=close * 10)


def test_a_gradient_passes_through() -> None:
    query, keys, values = tensors(7)
    keys.requires_grad_(True)
    exact_attention(query, keys, values, CAUSAL, RULES["both"]).square().sum().backward()
    found, keys.grad = keys.grad, None
    mask = causal_mask(7, TOKENS, query.device)
    dense(query, keys, values, mask, RULES["both"])[0].square().sum().backward()
    torch.testing.assert_close(found, keys.grad, atol=1e-4, rtol=1e-3)


def test_half_precision_is_normalised_in_float32() -> None:
    query, keys, values = tensors(7, torch.bfloat16)
    expected, _ = dense(query, keys, values, causal_mask(7, TOKENS, query.device), RULES["both"])
    found = exact_attention(query, keys, values, CAUSAL, RULES["both"])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=3e-2, rtol=3e-2)


class Attention(nn.Module):
    """What transformers hands to an attention function in the place of itself."""

    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


def test_tensors_are_attended_to_with_all_that_modules_ask_for() -> None:
    query, keys, values = tensors(TOKENS)
    mask = causal_mask(TOKENS, TOKENS, query.device)
    module = Attention().eval()
    output, _ = attention_forward(module, query, keys, values, mask, 0.8, softcap=2.0, s_aux=SINKS, sliding_window=4)
    torch.testing.assert_close(
        output.double(), dense(query, keys, values, mask, RULES["both"])[0], atol=2e-6, rtol=2e-5
    )
    plain, _ = attention_forward(module, query, keys, values, mask, 0.8, softcap=None, position_ids=None)
    expected = dense(query, keys, values, mask, Scaling(0.8))[0]
    torch.testing.assert_close(plain.double(), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("asked", [{"indices": torch.zeros(1)}, {"block_indices": 3}, {"is_causal": False}])
def test_what_is_not_computed_is_refused_by_its_name(asked: dict[str, object]) -> None:
    query, keys, values = tensors(7)
    name = next(iter(asked))
    with pytest.raises(UserError, match=f"Attention asks attention for {name}.*cannot be measured"):
        attention_forward(Attention(), query, keys, values, None, 0.8, **asked)
    with pytest.raises(UserError, match=r"drops attention weights: call model.eval\(\)"):
        attention_forward(Attention(), query, keys, values, None, 0.8, dropout=0.1, softcap=2.0)
