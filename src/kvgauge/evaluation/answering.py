"""Answers of one cell to one batch of prompts, and the exact prefill that cells share.

The order is always: prefill the context, compress, read the question, decode (``compress_at: context``), or prefill
context and question, compress, decode (``prompt``). Whether a cell runs alone or beside others makes no difference:
its cache adopts the same exact keys and values either way.

Where a model's rotary frequencies depend on the length of a prompt, context and question are read by those of the whole
prompt, as if they were read in one pass; the answer is decoded as transformers' own ``generate`` goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgauge.architecture.facts import model_facts
from kvgauge.architecture.prompt_length import length_dependent, prompt_length
from kvgauge.contract.budget import TOLERANCE, reference_nbytes
from kvgauge.contract.while_decoding import new_cache
from kvgauge.errors import UserError
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.decoding import greedy_batch, prefill, stop_tokens
from kvgauge.evaluation.drafting import Drafts, greedy_drafted
from kvgauge.evaluation.frequencies import check_frequencies
from kvgauge.evaluation.growth import Growth
from kvgauge.evaluation.likelihood import likelihoods
from kvgauge.evaluation.sampling import Sampler
from kvgauge.evaluation.stopping import StopTexts
from kvgauge.layers.cache import KVCache
from kvgauge.layers.inputs import LayerInputs
from kvgauge.methods.exact.full import Full
from kvgauge.prompts.choices import as_text
from kvgauge.prompts.encoding import Batch


@dataclass
class ExactPrefill:
    """The exact cache of a batch, which every cell with an exact prefill adopts.

    Attributes:
        cache: uncompressed.
        logits: (batch, vocabulary) after the last prefilled token.
        upto: ``context`` or ``prompt``: what was prefilled.
        seconds: that it took.
    """

    cache: KVCache
    logits: Tensor
    upto: str
    seconds: float


@dataclass
class Answer:
    """What one cell made of one prompt; everything but `seconds` depends on cell and prompt alone.

    Attributes:
        text: as it was decoded, without the answer prefix; scores trim it as their benchmark does.
        nbytes: cached bytes right after the compression, per sequence of the batch.
        nbytes_end: at the end of the answer.
        nbytes_peak: most of them while the answer was written.
        nbytes_written: tokens of the answer in the cache and bytes, where the bytes changed.
        full_nbytes_end: an uncompressed cache of as many tokens as at the end.
        budget_overrun: of a cell that compresses while decoding under a budget, the bytes over those that the budget
            allows the whole sequence, the largest of all multiples so far; None where there is none.
        nbytes_by_part: of `nbytes`.
        fixed_nbytes: projections and the like, once for all sequences.
        full_nbytes: an uncompressed cache of as many tokens: what the cell's budget is a share of.
        context_tokens: of this prompt, before the compression.
        compressed_tokens: of this prompt, that the compression took.
        seconds: ``prefill`` (shared by the cells that adopt it), ``compress``, ``question`` and ``decode``, of the
            whole batch; of longer answers ``step_at_start`` and ``step_at_end``, the median forward pass there.
    """

    text: str
    nbytes: int
    nbytes_end: int
    nbytes_peak: int
    nbytes_written: list[list[int]]
    full_nbytes_end: int
    budget_overrun: float | None
    nbytes_by_part: dict[str, int]
    fixed_nbytes: int
    full_nbytes: int
    context_tokens: int
    compressed_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class _Reading:
    """A cache that has read a prompt and is compressed, and what was measured of it."""

    cache: KVCache
    logits: Tensor
    measured: list[dict[str, Any]]
    seconds: dict[str, float]


class Answerer:
    """Prefills and answers with one model.

    Args:
        model, tokenizer: from `kvgauge.load_model`.
        draft_tokens: the most tokens of a draft that are checked at once, see `kvgauge.evaluation.drafting`; 0 decodes
            token by token, and so do batches and conversations.
        temperature: of sampled answers; 0 answers greedily.
        seed: of sampled answers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        draft_tokens: int = 0,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.draft_tokens = model, tokenizer, draft_tokens
        self.temperature, self.seed = temperature, seed
        self.stop = stop_tokens(model, tokenizer)
        self.full = Full()
        self.adapting = length_dependent(model)

    def alone(self, cell: Cell) -> bool:
        """The cell answers the prompts of a batch one by one: each has frequencies of its own, or the method does."""
        return cell.method.needs.alone or self.adapting is not None

    def drafts(self, batch: Batch) -> Drafts | None:
        """Where drafts of a batch's answers come from; None where there are none, or every token has frequencies."""
        if not self.draft_tokens or batch.size > 1 or len(batch.max_new_tokens) > 1 or self.adapting is not None:
            return None
        return Drafts(self.draft_tokens, [*batch.context[0].tolist(), *batch.question[0].tolist()])

    def exact_prefill(self, batch: Batch, inputs: bool = False) -> ExactPrefill:
        """The exact cache of the batch's contexts.

        Args:
            batch: the prompts.
            inputs: keep what the attention modules are given, for cells whose methods see it.
        """
        cache = self.full.new_cache(self.model)
        cache.inputs = LayerInputs(self.model, cache) if inputs else None
        start = self._now()
        with prompt_length(self.model, batch.width("prompt")):
            logits = prefill(self.model, self._ids(batch.context), cache, mask=self._mask(batch.context_mask))
        return ExactPrefill(cache, logits, "context", self._now() - start)

    def extend(self, exact: ExactPrefill, batch: Batch) -> None:
        """Prefill the question as well, for the cells that compress after it."""
        start = self._now()
        mask = self._mask(batch.prompt_mask)
        with prompt_length(self.model, batch.width("prompt")):
            exact.logits = prefill(self.model, self._ids(batch.question), exact.cache, mask=mask)
        exact.upto = "prompt"
        exact.seconds += self._now() - start

    def answer(
        self, cell: Cell, batch: Batch, exact: ExactPrefill | None, drafts: Drafts | None = None
    ) -> list[list[Answer]]:
        """The answers of a cell: for each sequence of the batch one per turn.

        Args:
            cell: whose cache is built.
            batch: the prompts.
            exact: of this batch, up to the cell's moment of compression; None lets the cell prefill by itself.
            drafts: of this batch; they learn the answer.

        Raises:
            RuntimeError: the cell claims a budget below 1 and did not compress.
            UserError: the method refuses the prompt, or did not keep to its budget while it was decoding; or the answer
                would be turned by other rotary frequencies than the prompt, and the method, or the model, is not right
                then.
        """
        reading = self._read(cell, batch, exact)
        if batch.choices:
            return [[self._choose(cell, batch, reading, lambda: self._read(cell, batch, exact).cache)]]
        return self._decode(cell, batch, reading, drafts)

    def _read(self, cell: Cell, batch: Batch, exact: ExactPrefill | None) -> _Reading:
        """Everything before the answer."""
        with prompt_length(self.model, batch.width("prompt")):
            return self._read_prompt(cell, batch, exact)

    def _read_prompt(self, cell: Cell, batch: Batch, exact: ExactPrefill | None) -> _Reading:
        model, seconds = self.model, {}
        cache = new_cache(cell.method, model, cell.fitted)
        follow_ups = sum(ids.shape[1] for ids in batch.follow_ups)
        longest = batch.width("prompt") + follow_ups + sum(max(limits) for limits in batch.max_new_tokens) - 1
        padded = batch.prompt_mask is not None
        check_frequencies(cell.label, model, cache, batch.width("prompt"), longest, padded=padded)
        logits = exact.logits if exact is not None else None
        start = self._now()
        if exact is not None:
            assert exact.upto == cell.compress_at
            cache.adopt(exact.cache)
            seconds["prefill"] = exact.seconds
        else:
            cache.expect(batch.width(cell.compress_at), batch.padding(cell.compress_at))
            logits = prefill(model, self._ids(batch.context), cache, mask=self._mask(batch.context_mask))
            if cell.compress_at == "prompt":
                logits = prefill(model, self._ids(batch.question), cache, mask=self._mask(batch.prompt_mask))
            seconds["prefill"] = self._now() - start
            start = self._now()
        cache.compress()
        seconds["compress"] = self._now() - start
        measured = self._measure(cell, cache, batch)

        start = self._now()
        if cell.compress_at == "context":
            logits = prefill(model, self._ids(batch.question), cache, mask=self._mask(batch.prompt_mask))
        seconds["question"] = self._now() - start
        assert logits is not None
        return _Reading(cache, logits, measured, seconds)

    def _decode(self, cell: Cell, batch: Batch, reading: _Reading, drafts: Drafts | None) -> list[list[Answer]]:
        """The answers, turn by turn."""
        model, cache, logits, seconds = self.model, reading.cache, reading.logits, reading.seconds
        answers: list[list[Answer]] = [[] for _ in range(batch.size)]
        mask = self._mask(batch.prompt_mask)
        ends = [StopTexts(self.tokenizer, texts) for texts in batch.stop]
        ended = ends[0] if ends else None
        choose = Sampler(self.temperature, self.seed, batch.names) if self.temperature else None
        unread: list[int] = []  # tokens of the answer that the cache ends before
        for turn, limits in enumerate(batch.max_new_tokens):
            if turn:
                start = self._now()
                ids = torch.cat([torch.tensor([unread], dtype=torch.long), batch.follow_ups[turn - 1]], dim=1)
                logits = prefill(model, self._ids(ids), cache)
                seconds = {"prefill": 0.0, "compress": 0.0, "question": self._now() - start}
            start, before = self._now(), cache.get_seq_length()
            growth = Growth(cache, self._now)
            if drafts is not None:
                tokens = [greedy_drafted(model, logits, cache, limits[0], self.stop, drafts, ended=ended, watch=growth)]
                drafts.answers.append(tokens[0])
            else:
                tokens = greedy_batch(
                    model, logits, cache, limits, self.stop, mask, ends=ends, choose=choose, watch=growth
                )
            seconds["decode"] = self._now() - start
            unread = tokens[0][cache.get_seq_length() - before :]
            written = self._written(cell, cache, growth, before, batch.size)
            for row, text in enumerate(self.tokenizer.batch_decode(tokens, skip_special_tokens=True)):
                known = reading.measured[row] | written | {"seconds": seconds | growth.seconds()}
                answers[row].append(Answer(text=text, **known))
        return answers

    def _choose(self, cell: Cell, batch: Batch, reading: _Reading, again: Callable[[], KVCache]) -> Answer:
        """The log-probabilities of a prompt's choices; bytes are those before any of them is read."""
        cache, start = reading.cache, self._now()
        written = self._written(cell, cache, Growth(cache, self._now), cache.get_seq_length(), batch.size)
        found = likelihoods(self.model, reading.logits, reading.cache, batch.choices, again)
        seconds = reading.seconds | {"decode": self._now() - start}
        return Answer(text=as_text(found), **reading.measured[0] | written | {"seconds": seconds})

    def _measure(self, cell: Cell, cache: KVCache, batch: Batch) -> list[dict[str, Any]]:
        """Bytes and the proof that the compression happened, for each sequence."""
        width = batch.width(cell.compress_at)
        full = reference_nbytes(cell.method, model_facts(self.model), width)
        nbytes = _share(cache.nbytes(), batch.size)
        if cache.compressed_tokens != width:
            raise RuntimeError(f"{cell.label} compressed {cache.compressed_tokens} of {width} tokens")
        if cell.budget is not None and cell.budget < 1 and nbytes >= full:
            raise RuntimeError(f"{cell.label} holds {nbytes} bytes where an uncompressed cache holds {full}")
        shared = {
            "nbytes": nbytes,
            "nbytes_by_part": {part: _share(size, batch.size) for part, size in cache.nbytes_by_part().items()},
            "fixed_nbytes": cache.fixed_nbytes(),
            "full_nbytes": full,
        }
        padding = batch.padding(cell.compress_at)
        return [
            shared | {"context_tokens": width - pad, "compressed_tokens": cache.compressed_tokens - pad}
            for pad in padding
        ]

    def _written(self, cell: Cell, cache: KVCache, growth: Growth, before: int, sequences: int) -> dict[str, Any]:
        """Bytes while an answer was written behind `before` tokens, per sequence.

        Raises:
            UserError: a compression while decoding left more than the budget allows.
        """
        facts, overrun = model_facts(self.model), None
        if cell.budget is not None:
            for one in cache.recompressions:
                allowed = cell.budget * reference_nbytes(cell.method, facts, one.tokens) * sequences
                overrun = max(overrun or 0.0, one.after / allowed)
                if one.after > TOLERANCE * allowed:
                    raise UserError(
                        f"{cell.label} holds {one.after / allowed:.3f} of the bytes of its budget after {one.tokens} "
                        f"tokens: raise the budget, or leave while_decoding out"
                    )
        return {
            "nbytes_end": _share(cache.nbytes(), sequences),
            "nbytes_peak": _share(growth.peak(), sequences),
            "nbytes_written": [[tokens - before, _share(size, sequences)] for tokens, size in growth.whole()],
            "full_nbytes_end": reference_nbytes(cell.method, facts, cache.get_seq_length()),
            "budget_overrun": overrun,
        }

    def _ids(self, ids: Tensor) -> Tensor:
        return ids.to(self.model.device)

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.to(self.model.device)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def _share(nbytes: int, sequences: int) -> int:
    return round(nbytes / sequences)
