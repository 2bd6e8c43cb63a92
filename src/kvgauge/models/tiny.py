"""Random-weight models and their tokenizer: every architecture in a second, with no download."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kvgauge.errors import UserError
from kvgauge.models.overrides import overridden
from kvgauge.models.spec import ModelSpec


def random_model(spec: ModelSpec) -> PreTrainedModel:
    """A model with weights drawn from ``spec.seed``, on the CPU, in ``spec.dtype``.

    Raises:
        UserError: transformers does not know the architecture.
    """
    fields: dict[str, Any] = dict(spec.architecture or {})
    model_type = fields.pop("model_type")
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise UserError(f"model {spec.name}: transformers does not know model_type {model_type!r}") from error
    if spec.config:
        config = overridden(config, spec.config, spec.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(spec.torch_dtype)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes and three special tokens, which needs no vocabulary file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
