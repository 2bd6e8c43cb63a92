"""What every method must pass, for the tests of whoever writes one: `check_method`, and its parts one by one.

    from kvgauge.testing import check_method

    def test_mine():
        model, _ = kvgauge.load_model("tiny/llama")
        check_method(kvgauge.build_method("package.module.Mine", budget=0.5), model)

A check raises AssertionError with what it found. Nothing here knows any method.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import model_facts
from kvgauge.calibration.collecting import collect
from kvgauge.contract.budget import TOLERANCE, reference_nbytes
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import learns
from kvgauge.contract.method import Method, budget_in_force
from kvgauge.contract.roles import Quantizer, lossless_of
from kvgauge.errors import UserError
from kvgauge.layers.cache import KVCache
from kvgauge.measure.random_prompts import compressed_cache, random_tokens, relative_error
from kvgauge.simulation.running import Run, run_on_cpu, run_on_devices
from kvgauge.store.buffers import GROWTH_STEP

CLOSE = 1e-4  # relative, of logits in float32 that took another way
DEVICE_CLOSE = 1e-3  # the same of compiled kernels and torch, of factorisations that LAPACK makes in another way
CONTEXT, QUESTION = 96, 11
LONG = 512  # tokens of a context whose bytes are measured
HOLDERS = ("kvgauge.", "transformers.cache_utils")  # whose objects hold what is cached


def check_method(method: Method, model: PreTrainedModel, fitted: Fitted | None = None) -> None:
    """Everything below.

    Args:
        method: with a budget or a size of its own.
        model: a small one, e.g. ``tiny/llama``, in float32.
        fitted: what the method learned on it; None lets a method that learns fit on random tokens.

    Raises:
        AssertionError: a check failed.
        UserError: the method refuses the model.
    """
    if fitted is None and learns(method):
        fitted = fit_on_random_tokens(method, model)
    check_lossless(method, model, fitted)
    check_bytes(method, model, fitted)
    check_batches(method, model, fitted)
    check_padding(method, model, fitted)
    check_loops(method, model, fitted)
    check_devices(method, model, fitted)
    if method.every is not None:
        check_while_decoding(method, model, fitted)


def fit_on_random_tokens(method: Method, model: PreTrainedModel) -> Fitted | None:
    """What a method learns from a few random sequences."""
    moments = collect(model, [random_tokens(4, 160, seed=1)], held_out=random_tokens(2, 160, seed=11))
    return method.fit(moments, model)


def check_lossless(method: Method, model: PreTrainedModel, fitted: Fitted | None = None) -> bool:
    """At its lossless setting: the uncompressed model's logits, in a chunked prefill, a question and a decode step.

    Returns:
        False for a method that loses at every setting: nothing was checked.
    """
    whole = lossless_of(method, model_facts(model))
    if whole is None:
        return False
    ids = random_tokens(2, CONTEXT + QUESTION, seed=3)
    with torch.no_grad():
        expected = model(ids).logits[:, CONTEXT:]
        cache = compressed_cache(whole, model, fitted, ids[:, :CONTEXT], chunk=40)
        asked = model(ids[:, CONTEXT:-1], past_key_values=cache).logits
        decoded = model(ids[:, -1:], past_key_values=cache).logits
    error = relative_error(torch.cat([asked, decoded], dim=1), expected)
    assert error < CLOSE, f"{whole.label} is off by {error:.1e} at its lossless setting"
    assert cache.get_seq_length() == CONTEXT + QUESTION and cache.compressed
    return True


def check_bytes(method: Method, model: PreTrainedModel, fitted: Fitted | None = None, tokens: int = LONG) -> None:
    """Measured bytes keep to the budget, are what the method foretold, come close to the budget, and are all there is.

    Raises:
        UserError: the method cannot reach its budget, which is as good an answer.
    """
    facts, ids = model_facts(model), random_tokens(1, tokens)
    reference = reference_nbytes(method, facts, tokens)
    cache = compressed_cache(method, model, fitted, ids)
    gc.collect()
    size = cache.nbytes()
    assert sum(cache.nbytes_by_part().values()) == size
    foretold = method.nbytes(facts, fitted, tokens)
    assert abs(size - foretold) <= 0.02 * reference, f"{method.label} foretold {foretold} bytes and holds {size}"
    held = live_nbytes(cache) - cache.fixed_nbytes()
    assert held <= size * 1.05 + 4096, f"{method.label} holds {held} bytes and counts {size}"
    with torch.no_grad():  # decoding does not bring anything back
        model(random_tokens(1, 3, seed=9), past_key_values=cache)
    most = max(reference_nbytes(method, facts, tokens + GROWTH_STEP), held + facts.full_nbytes(GROWTH_STEP))
    assert live_nbytes(cache) - cache.fixed_nbytes() < most
    budget = budget_in_force(method)
    if budget is None:
        return
    assert size <= TOLERANCE * budget * reference, f"{method.label} holds {size / reference:.3f} of the bytes"
    if isinstance(method, Quantizer):
        larger = [_with_bits(method, bits) for bits in method.bit_choices]
        sizes = [compressed_cache(one, model, fitted, ids).nbytes() for one in larger]
    else:
        larger = [method.sized(budget + (1.0 - budget) * step / 16) for step in range(1, 17)]
        sizes = [one.nbytes(facts, fitted, tokens) for one in larger]
    own = size if isinstance(method, Quantizer) else foretold
    wasted = [one for one in sizes if own < one <= budget * reference]
    assert not wasted, f"{method.label} holds {size} bytes, and {max(wasted)} would keep to the budget too"


def _with_bits(method: Method, bits: float) -> Method:
    return replace(method, bits=bits)  # type: ignore[call-arg]  # a Quantizer has them


def live_nbytes(cache: KVCache) -> int:
    """Bytes of all tensor storages that the cache's layers hold, found without asking the cache."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    pending: list[object] = [vars(layer) for layer in (*cache.own, *cache.others())]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            pending.extend(item)
        elif type(item).__module__.startswith((*HOLDERS, type(cache).__module__)) and item is not cache:
            pending.append(vars(item))
    return sum(storages.values())


@torch.no_grad()
def check_while_decoding(
    method: Method, model: PreTrainedModel, fitted: Fitted | None = None, periods: int = 4
) -> None:
    """Of a method that compresses while decoding: it does so at every multiple, and there the bytes keep to the budget.

    At its lossless setting the logits are the uncompressed model's all the while.

    Args:
        method, model, fitted: as in `check_method`; the method with `while_decoding`.
        periods: multiples to go through, token by token.
    """
    assert method.every is not None, f"{method.label} does not compress while decoding"
    facts, budget, tokens = model_facts(model), budget_in_force(method), periods * method.every
    cache = compressed_cache(method, model, fitted, random_tokens(1, CONTEXT, seed=12))
    for token in random_tokens(1, tokens, seed=13).unbind(1):
        model(token[:, None], past_key_values=cache)
    wanted = [CONTEXT + method.every * (period + 1) for period in range(periods)]
    assert [one.tokens for one in cache.recompressions] == wanted
    for one in cache.recompressions:
        allowed = (1.0 if budget is None else budget) * reference_nbytes(method, facts, one.tokens)
        assert one.after <= TOLERANCE * allowed, (
            f"{method.label} holds {one.after / allowed:.3f} of the bytes of its budget after {one.tokens} tokens"
        )
    assert cache.nbytes() == cache.recompressions[-1].after
    whole = lossless_of(method, facts)
    if whole is None:
        return
    ids = random_tokens(2, CONTEXT + tokens, seed=14)
    expected = model(ids).logits[:, CONTEXT:]
    cache = compressed_cache(whole, model, fitted, ids[:, :CONTEXT])
    actual = [model(part, past_key_values=cache).logits for part in ids[:, CONTEXT:].split(3, dim=1)]
    error = relative_error(torch.cat(actual, dim=1), expected)
    assert error < CLOSE, f"{whole.label} is off by {error:.1e} at its lossless setting while decoding"


def check_batches(method: Method, model: PreTrainedModel, fitted: Fitted | None = None) -> None:
    """Two sequences take twice the bytes of one."""
    one, two = (compressed_cache(method, model, fitted, random_tokens(batch, 256)).nbytes() for batch in (1, 2))
    assert abs(two - 2 * one) <= 0.06 * one, f"{method.label}: one sequence takes {one} bytes, two take {two}"


def check_padding(
    method: Method, model: PreTrainedModel, fitted: Fitted | None = None, *, rows: Sequence[int] = (0,)
) -> None:
    """A left-padded batch gives what its sequences give alone.

    Args:
        method, model, fitted: as in `check_method`.
        rows: of a batch of two, the second shorter than the first, that have to agree: a budget of the batch's length
            may buy the shorter one more than it gets alone.
    """
    actual, expected = padded_and_alone(method, model, fitted)
    for row in rows:
        error = relative_error(actual[row], expected[row])
        assert error < CLOSE, f"row {row} of a padded batch of {method.label} is off by {error:.1e}"


@torch.no_grad()
def padded_and_alone(method: Method, model: PreTrainedModel, fitted: Fitted | None) -> tuple[Tensor, Tensor]:
    """Logits of a question behind two contexts, the second 17 tokens shorter: as one padded batch, and one by one."""
    long, short = random_tokens(1, CONTEXT, seed=4), random_tokens(1, CONTEXT - 17, seed=5)
    question = random_tokens(1, QUESTION, seed=6)
    expected = torch.stack(
        [
            model(question, past_key_values=compressed_cache(method, model, fitted, context)).logits[0]
            for context in (long, short)
        ]
    )
    batch = torch.cat([long, torch.cat([torch.zeros(1, 17, dtype=torch.long), short], dim=1)])
    mask = torch.ones(2, CONTEXT, dtype=torch.long)
    mask[1, :17] = 0
    cache = method.new_cache(model, fitted)
    cache.expect(CONTEXT, [0, 17])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    model(batch, attention_mask=mask, position_ids=positions, past_key_values=cache)
    cache.compress()
    longer = torch.cat([mask, torch.ones(2, QUESTION, dtype=torch.long)], dim=1)
    positions = (longer.cumsum(1) - 1)[:, -QUESTION:]
    actual = model(question.expand(2, -1), attention_mask=longer, position_ids=positions, past_key_values=cache).logits
    return actual, expected


@torch.no_grad()
def check_loops(method: Method, model: PreTrainedModel, fitted: Fitted | None = None) -> None:
    """Other people's loops: `generate` is the loop of forward passes; reordering and cropping work or refuse."""
    ids = random_tokens(1, CONTEXT, seed=7)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    by_itself = method.new_cache(model, fitted, context_length=CONTEXT)
    by_itself.expect(CONTEXT)
    generated = model.generate(ids, past_key_values=by_itself, **settings)
    cache = method.new_cache(model, fitted)
    cache.expect(CONTEXT)
    step = written = ids
    for _ in range(6):
        step = model(step, past_key_values=cache).logits[:, -1:].argmax(-1)
        cache.compress()
        written = torch.cat([written, step], dim=1)
    assert torch.equal(generated, written), f"{method.label}: generate is not the loop of forward passes"
    cache.compress()  # a second time, which does nothing
    for operation in (lambda: cache.crop(-2), lambda: cache.reorder_cache(torch.tensor([0]))):
        try:
            operation()
        except UserError as refusal:
            assert "\n" not in str(refusal)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.compressed


def check_devices(method: Method, model: PreTrainedModel, fitted: Fitted | None = None) -> None:
    """On simulated GPUs, one and two, with padding and without: the CPU's answers and bytes, no tensors of two devices.

    A decode step may wait for a device once, and no more.

    Raises:
        AssertionError: another answer, other bytes, or more waiting.
        MixedDevicesError: tensors of two devices met.
    """
    for padded in (False, True):
        try:
            expected = run_on_cpu(method, model, fitted, padded=padded)
        except UserError:
            continue  # what a method refuses, it refuses everywhere
        for devices in (["cuda:0"], ["cuda:0", "cuda:1"]):
            check_run(method.label, run_on_devices(method, model, fitted, devices, padded=padded), expected)


def check_run(label: str, run: Run, expected: Run, close: float = DEVICE_CLOSE) -> None:
    """A run on devices is the CPU's, to `close` of its logits."""
    error = relative_error(run.logits, expected.logits)
    assert error < close, f"{label} is off by {error:.1e} on devices"
    assert run.nbytes == expected.nbytes, f"{label} holds {run.nbytes} bytes on devices, {expected.nbytes} on the CPU"
    assert run.step is not None
    waits = run.step.syncs
    assert waits.total() <= 1, f"a decode step of {label} waits for the device at {', '.join(waits)}"
