"""Squeezed weights on disk, beside the dense copies of models: made once for a model and its options."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgauge.artifacts import read_tensors, write_tensors
from kvgauge.configuration import digest
from kvgauge.models.identity import model_fingerprint
from kvgauge.models.squeezellm import SEQUENCE_LENGTH, SqueezeLLM, linears, squeeze, squeezed_parts, weight_fisher
from kvgauge.user_cache import cache_root

CONVERSION = 1  # part of the cache key: raise it when the conversion itself changes


def squeeze_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: SqueezeLLM) -> None:
    """Squeeze the linear layers of `model` in place, from the copy on disk, made if it is not there yet.

    Raises:
        UserError: the calibration text is not there, or gradients are not finite.
    """
    key = digest({"model": model_fingerprint(model), "options": asdict(options), "conversion": CONVERSION})
    path = cache_root() / f"squeezellm-{key[:16]}.safetensors"
    if not path.is_file():
        from kvgauge.corpora.corpus import CorpusConfig, load_corpus

        count = options.fit_tokens // SEQUENCE_LENGTH
        corpus = CorpusConfig(sequence_length=SEQUENCE_LENGTH, num_sequences=count)
        fisher = weight_fisher(model, load_corpus(corpus, tokenizer, "calibration"))
        tensors: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, layer in linears(model):
                parts = squeezed_parts(layer.weight, fisher.pop(name), options)
                tensors |= {f"{name}/{part}": tensor.cpu() for part, tensor in parts.items()}
        write_tensors(path, tensors, {"options": asdict(options)})
    squeeze(model, read_tensors(path)[0])
    model._kvgauge_fingerprint = None  # another model from here on
