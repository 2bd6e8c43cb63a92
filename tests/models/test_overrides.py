"""Another context length or rotary base without editing files, and chat templates that do not know what day it is."""

from __future__ import annotations

from datetime import datetime

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import model_facts
from kvgauge.models import chat_template
from kvgauge.models.identity import model_fingerprint
from kvgauge.models.tiny import byte_tokenizer
from kvgauge.prompts.encoding import Template
from kvgauge.provenance import tokenizer_fingerprint

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 256}
DATED = "{{ strftime_now('%d %B %Y') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
THINKING = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and a tokenizer in a directory, as a user has them."""
    directory = tmp_path_factory.mktemp("model")
    model, tokenizer = kvgauge.load_model("tiny/llama")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_a_context_is_extended(saved):
    plain, _ = kvgauge.load_model(saved)
    longer, _ = kvgauge.load_model(saved, config={"max_position_embeddings": 65536, "rope_parameters": YARN})
    assert model_facts(longer).max_positions == 65536 != model_facts(plain).max_positions
    assert longer.get_decoder().rotary_emb.rope_type == "yarn"
    assert model_fingerprint(longer) != model_fingerprint(plain)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert not torch.allclose(longer(ids).logits, plain(ids).logits, atol=1e-3)


def test_random_models_take_overrides_too():
    model, _ = kvgauge.load_model("tiny/llama", config={"max_position_embeddings": 123})
    assert model_facts(model).max_positions == 123


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_position_embedings": 5}, "'max_position_embedings': did you mean 'max_position_embeddings'"),
        ({"rope_parameters": {"rope_type": "yarm", "rope_theta": 1.0}}, "unknown rope_type .* did you mean 'yarn'"),
    ],
)
def test_a_bad_override_is_one_line(config, message, saved):
    with pytest.raises(kvgauge.UserError, match=message) as refusal:
        kvgauge.load_model(saved, config=config)
    assert "\n" not in str(refusal.value)


def dated(template, **options):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    chat_template.fix_template(tokenizer, options.get("values", {}), options.get("today", "2024-07-26"))
    return tokenizer


def test_a_date_in_a_template_is_the_configuration_s():
    tokenizer = dated(DATED)
    assert Template.of(tokenizer).before == "26 July 2024[user]"
    assert str(datetime.now().year) not in tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(dated(DATED, today="2024-07-27"))
    assert tokenizer_fingerprint(dated(THINKING)) == tokenizer_fingerprint(dated(THINKING, today="2024-07-27"))


def test_a_date_in_a_computed_form_is_refused():
    with pytest.raises(kvgauge.UserError, match="computes how it prints today's date"):
        dated("{% set form = '%Y' %}{{ strftime_now(form) }}")


def test_values_reach_the_template_and_its_identity():
    thinking, plain = dated(THINKING), dated(THINKING, values={"enable_thinking": False})
    assert Template.of(thinking).after == "<think>" and Template.of(plain).after == ""
    assert tokenizer_fingerprint(thinking) != tokenizer_fingerprint(plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"date": "yesterday"}, "model.date 'yesterday' is no date: write it as 2026-01-31"),
        ({"chat_template_kwargs": {"messages": []}}, "sets messages, which is the prompt's own"),
    ],
)
def test_bad_values_are_one_line(options, message):
    with pytest.raises(kvgauge.UserError, match=message) as refusal:
        kvgauge.load_model("tiny/llama", **options)
    assert "\n" not in str(refusal.value)
