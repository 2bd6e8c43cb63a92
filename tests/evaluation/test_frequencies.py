"""Rotary frequencies that depend on a prompt's length: every prompt is answered as transformers answers it alone."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.contract.fitting import learns
from kvgauge.errors import UserError
from kvgauge.evaluation.answering import Answerer
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.engine import Engine
from kvgauge.evaluation.lm_eval_model import KVGaugeLM
from kvgauge.evaluation.store import AnswerStore
from kvgauge.evaluation.units import Encoder, make_units
from kvgauge.models.attaching import attach
from kvgauge.models.tiny import byte_tokenizer
from kvgauge.models.zoo import zoo_model
from kvgauge.prompts.encoding import Prompt, batch_of
from kvgauge.testing import fit_on_random_tokens

NAMES = ["llama-dynamic", "phi3-longrope"]  # both change at 128 tokens
LENGTHS = (300, 60, 201)  # a prompt beyond the change, one below it, one beyond it again
ANSWER = 8


def prompt(tokens: int) -> Prompt:
    ids = torch.randint(3, 259, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    return Prompt(ids[:, : tokens - 13], ids[:, tokens - 13 :])


def of_transformers(name: str, tokens: int, answer: int = ANSWER) -> list[int]:
    """The answer of a model that has read nothing before."""
    ids = torch.cat([prompt(tokens).context, prompt(tokens).question], dim=1)
    generated = zoo_model(name).generate(
        ids,
        max_new_tokens=answer,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        attention_mask=torch.ones_like(ids),
    )
    return generated[0, tokens:].tolist()


class Answers(Answerer):
    """Token ids in the place of their text."""

    def __init__(self, model) -> None:
        super().__init__(model, byte_tokenizer())
        self.stop = set()

    def tokens(self, cell: Cell, tokens: int, answer: int = ANSWER, *, shared: bool = False) -> list[int]:
        batch = batch_of([prompt(tokens)], [answer], pad=0)
        exact = self.exact_prefill(batch) if shared else None
        if exact is not None and cell.compress_at == "prompt":
            self.extend(exact, batch)
        said = []

        def listen(found: list[list[int]], **options: bool) -> list[str]:
            said.extend(found[0])
            return ["" for _ in found]

        self.tokenizer.batch_decode = listen  # type: ignore[method-assign]
        self.answer(cell, batch, exact)
        return said


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    made = zoo_model(request.param)
    attach(made)
    made.zoo_name = request.param
    return made


@pytest.mark.parametrize("compress_at", ["context", "prompt"])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("method", ["full", "kqsvd", "xkv", "kvquant", "minicache"])
def test_one_prompt_after_another_is_answered_as_alone(model, method, order, compress_at):
    facts = kvgauge.architecture.facts.model_facts(model)
    options = {"xkv": {"group_size": 2}}.get(method, {})
    built = kvgauge.build_method(method, **options)
    whole = built if method == "full" else built.lossless(facts)
    cell = Cell(whole, compress_at, fit_on_random_tokens(whole, model) if learns(whole) else None)
    answers = Answers(model)
    for shared in (False, True):
        for tokens in LENGTHS[::order]:
            assert answers.tokens(cell, tokens, shared=shared) == of_transformers(model.zoo_name, tokens)


def test_a_method_that_moves_keys_is_right_or_refuses(model):
    answers = Answers(model)
    for name in ("streaming_llm", "kvslimmer", "mean_merge"):
        cell = Cell(kvgauge.build_method(name, budget=1.0), "context", None)
        assert answers.tokens(cell, 60) == of_transformers(model.zoo_name, 60)
        if model.zoo_name == "phi3-longrope":
            assert answers.tokens(cell, 300) == of_transformers(model.zoo_name, 300)
            continue
        with pytest.raises(UserError, match=rf"^{name}.* moves keys to other positions, and rope") as refusal:
            answers.tokens(cell, 300)
        assert "\n" not in str(refusal.value)
        with pytest.raises(UserError, match="moves keys"):
            answers.tokens(cell, 125)
        assert answers.tokens(cell, 125, answer=1) == of_transformers(model.zoo_name, 125, answer=1)


def test_an_answer_across_the_change_of_longrope_is_refused():
    made = zoo_model("phi3-longrope")
    attach(made)
    cell, answers = Cell(kvgauge.build_method("full"), "context", None), Answers(made)
    with pytest.raises(
        UserError, match=r"^rope type 'longrope' changes its frequencies between a prompt of 125 tokens"
    ):
        answers.tokens(cell, 125)
    assert answers.tokens(cell, 125, answer=4) == of_transformers("phi3-longrope", 125, answer=4)
    assert answers.tokens(cell, 129) == of_transformers("phi3-longrope", 129)


def test_an_answer_across_the_change_of_dynamic_frequencies_is_that_of_transformers():
    made = zoo_model("llama-dynamic")
    attach(made)
    cell, answers = Cell(kvgauge.build_method("full"), "context", None), Answers(made)
    assert answers.tokens(cell, 125, answer=12) == of_transformers("llama-dynamic", 125, answer=12)


def test_prompts_of_several_lengths_are_read_one_by_one(model, make_samples, tmp_path):
    class Nobody:
        def answered(self, cell, sample, text):
            """Nothing is done with an answer."""

    tokenizer = byte_tokenizer()
    samples = make_samples(3, words=12, max_new_tokens=6)
    cell = Cell(kvgauge.build_method("full"), "context", None, {"label": "full"})
    found = []
    for batch_size in (1, 3):
        encoder, store = Encoder(model, tokenizer, chat=None), AnswerStore(tmp_path / str(batch_size))
        units = make_units(samples, encoder, batch_size)
        Engine(Answerer(model, tokenizer), encoder, [cell], store, Nobody()).run(units)
        keys = {sample.id: key for unit in units for sample, key in zip(unit.samples, unit.keys, strict=True)}
        found.append([store.get(cell.fingerprint, keys[sample.id])["text"] for sample in samples])
    assert found[0] == found[1]
    batch = batch_of([prompt(60), prompt(70)], [4, 4], pad=0)
    with pytest.raises(UserError, match="one batch has several lengths: use batch_size=1"):
        Answerer(model, tokenizer).answer(cell, batch, None)


@pytest.mark.parametrize("name", NAMES)
def test_continuations_are_scored_as_in_one_pass(name, tmp_path):
    zoo_model(name).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    scorer = KVGaugeLM(str(tmp_path), method="full", tail=3)
    for tokens in (*LENGTHS, *LENGTHS[::-1]):
        written = torch.cat([prompt(tokens).context, prompt(tokens).question], dim=1)[0].tolist()
        with torch.no_grad():
            logits = zoo_model(name)(torch.tensor([written[:-1]])).logits[0, -5:].log_softmax(dim=-1)
        expected = float(logits.gather(1, torch.tensor(written[-5:])[:, None]).sum())
        ((found, _),) = scorer._loglikelihood_tokens([(("", ""), written[:-5], written[-5:])], disable_tqdm=True)
        assert found == pytest.approx(expected, abs=1e-3)


def test_calibration_takes_the_moments_before_the_rotation(model):
    moments = kvgauge.collect(model, [torch.randint(3, 259, (2, 150), generator=torch.Generator().manual_seed(1))])
    assert set(moments.tensors) == {"k_post", "k_pre", "q_post", "q_pre", "v"}
