"""Log-probabilities of choices against a forward pass of prompt and choice without a cache, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvgauge
from kvgauge.evaluation.answering import Answerer
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.units import Encoder, make_units
from kvgauge.prompts.choices import of_text
from kvgauge.prompts.samples import Choice, Sample

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]
CellMaker = Callable[..., Cell]
CHOICES = (Choice(" blue"), Choice(" red"), Choice("?", " not blue but red, is it"), Choice(" b"), Choice(" blue"))


def sample(**changes: Any) -> Sample:
    known: dict[str, Any] = {
        "id": "sky-0",
        "task": "sky",
        "context": "The sky is blue. The grass is green. " * 4,
        "question": "The sky is",
        "answers": ("blue",),
        "max_new_tokens": 8,
        "length": 0,
        "chat": False,
        "choices": CHOICES,
    }
    return Sample(**known | changes)


def scored(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cell: Cell) -> list[tuple[float, bool]]:
    encoder = Encoder(model, tokenizer, chat=None)
    [unit] = make_units([sample()], encoder)
    batch, _ = encoder.batch(unit)
    answerer = Answerer(model, tokenizer)
    exact = answerer.exact_prefill(batch) if cell.method.needs.exact_prefill else None
    if exact is not None and cell.compress_at == "prompt":
        answerer.extend(exact, batch)
    [[answer]] = answerer.answer(cell, batch, exact)
    assert answer.nbytes_end >= answer.nbytes > 0
    return of_text(answer.text)


@pytest.mark.parametrize("compress_at", ["context", "prompt"])
def test_the_uncompressed_cache_scores_as_no_cache(make_cell: CellMaker, compress_at: str) -> None:
    model, tokenizer = kvgauge.load_model("tiny/llama", dtype="float64")
    asked = sample()
    for choice, (value, greedy) in zip(
        CHOICES, scored(model, tokenizer, make_cell("full", compress_at=compress_at)), strict=True
    ):
        before = tokenizer(asked.context + asked.question + choice.rest).input_ids
        whole = tokenizer(asked.context + asked.question + choice.rest + choice.text).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([whole[:-1]])).logits[0, len(before) - 1 :].double()
        wanted = torch.tensor(whole[len(before) :])
        chosen = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
        assert value == pytest.approx(float(chosen), rel=1e-6)
        assert greedy == bool((logits.argmax(-1) == wanted).all())


# Caches that can forget a choice, and caches that are made again for the next one.
@pytest.mark.parametrize(
    ("name", "fields"),
    [("ksvd", {"budget": 0.5}), ("kvslimmer", {"budget": 0.5}), ("streaming_llm", {"budget": 0.5})],
)
def test_no_choice_sees_another(tiny: Tiny, make_cell: CellMaker, name: str, fields: dict[str, Any]) -> None:
    found = scored(*tiny, make_cell(name, **fields))
    assert found[0] == pytest.approx(found[4], rel=1e-5)
    assert len({round(value, 3) for value, _ in found}) == 4


def test_a_choice_without_a_token_is_refused(tiny: Tiny) -> None:
    encoder = Encoder(*tiny, chat=None)
    [unit] = make_units([sample(choices=(Choice(""),))], encoder)
    with pytest.raises(kvgauge.UserError, match="adds no token"):
        encoder.batch(unit)
