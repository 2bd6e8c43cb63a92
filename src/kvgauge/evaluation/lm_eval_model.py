"""`kvgauge` as a model that lm-eval knows: any of its tasks on a compressed cache.

lm-eval hands over one text, with no word about what is context and what is question. So all of it is context but its
last tokens: those are read after the compression, and with them everything that is generated or scored.

Register it by importing this module, or let ``python -m kvgauge.lm_eval`` do so and call lm-eval's command line::

    python -m kvgauge.lm_eval --model kvgauge --model_args pretrained=smollm2-135m,method=kqsvd,budget=0.5 --tasks ...
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from kvgauge import configuration
from kvgauge.architecture.facts import UNLIMITED, model_facts
from kvgauge.architecture.prompt_length import fixed_length, prompt_length
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import learns
from kvgauge.contract.method import Method
from kvgauge.contract.while_decoding import new_cache
from kvgauge.errors import UserError
from kvgauge.evaluation.decoding import prefill
from kvgauge.evaluation.frequencies import check_frequencies
from kvgauge.layers.adoption import Prefill
from kvgauge.layers.cache import KVCache
from kvgauge.methods.exact.full import Full
from kvgauge.methods.registry import build_method
from kvgauge.models.loading import load_model
from kvgauge.provenance import PROJECTIONS, fit_directory

_METHOD_PREFIX = "method_"
_TokenRequest = tuple[tuple[str, str], list[int], list[int]]


@register_model("kvgauge")
class KVGaugeLM(HFLM):
    """A model whose prompts are compressed before anything is generated or scored.

    Args:
        pretrained: a name of ``conf/model/``, a hub id, a directory or a ``.gguf`` file.
        method: a name of ``conf/method/``.
        budget: of the method.
        tail: last tokens of every prompt that are read after the compression, at least 1.
        fitted: the projections of a method that learns (``projections.safetensors``); None looks for those of `corpus`
            below `artifacts`.
        artifacts, corpus: where and from what `kvgauge fit` made them.
        dtype, device: as `kvgauge.load_model`.
        options: fields of the method with the prefix ``method_`` (``method_rank=32``); everything else goes to
            lm-eval's `HFLM`, e.g. ``batch_size``.

    Raises:
        UserError: unknown names, missing projections, a tail below 1.
    """

    def __init__(
        self,
        pretrained: str,
        method: str = "kqsvd",
        budget: float | None = None,
        tail: int = 1,
        fitted: str | None = None,
        artifacts: str = "artifacts",
        corpus: str = "essays",
        dtype: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        if tail < 1:
            raise UserError(f"tail is {tail}: at least the last token has to be read after the compression")
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # lm-eval's command line says cuda:0 where nothing was said, and its own models do this too
        model, tokenizer = load_model(pretrained, dtype=None if dtype == "auto" else dtype, device=device)
        fields = {name.removeprefix(_METHOD_PREFIX): options.pop(name) for name in _method_options(options)}
        if budget is not None:
            fields["budget"] = budget
        self.method: Method = build_method(method, **fields)
        self.tail = tail
        self.compressed_prompts = 0
        self._last: tuple[Tensor, int | None, KVCache] | None = None
        positions = model_facts(model).max_positions
        if positions < UNLIMITED:  # lm-eval knows of no rotary frequencies that serve more of them
            options.setdefault("max_length", positions)
        super().__init__(pretrained=model, tokenizer=tokenizer, device=str(model.device), **options)
        self.fitted = self._fitted(fitted, Path(artifacts), corpus)

    def _fitted(self, path: str | None, root: Path, corpus: str) -> Fitted | None:
        if not learns(self.method):
            return None
        if path is None:
            cfg = OmegaConf.create({"corpus": configuration.read("corpus", corpus)})
            path = str(fit_directory(cfg, self.model, self.tokenizer, self.method, root) / PROJECTIONS)
        return Fitted.load(Path(path))

    def compressed_cache(self, context: Tensor, mask: Tensor | None = None) -> KVCache:
        """A cache that holds `context` (batch, tokens) compressed.

        Args:
            context: at least one token.
            mask: (batch, tokens), False on padding; None where nothing is padded.
        """
        cache = new_cache(self.method, self.model, self.fitted)
        if cache.prefill is Prefill.EXACT:
            cache.adopt(self._exact_cache(context, mask))
        else:
            cache.expect(context.shape[1])
            prefill(self.model, context, cache, mask=mask)
        cache.compress()
        if cache.compressed_tokens != context.shape[1]:
            raise RuntimeError(f"{self.method.label} compressed {cache.compressed_tokens} of {context.shape[1]} tokens")
        self.compressed_prompts += context.shape[0]
        return cache

    def _exact_cache(self, context: Tensor, mask: Tensor | None) -> KVCache:
        """The exact cache of a context; the last one is kept, for the choices of one question come in a row."""
        length, last = fixed_length(self.model), self._last
        if last is None or mask is not None or last[1] != length or not torch.equal(last[0], context):
            self._last = None
            exact = Full().new_cache(self.model)
            prefill(self.model, context, exact, mask=mask)
            if mask is not None:
                return exact
            self._last = (context, length, exact)
            return exact
        return last[2]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """lm-eval's hook: `context` (batch, tokens), left-padded, and its answers behind it."""
        if context.shape[1] > self.tail:
            seen = generation_kwargs["attention_mask"].bool()
            mask, tokens = None if bool(seen.all()) else seen[:, : -self.tail], context.shape[1]
            with prompt_length(self.model, tokens):
                cache = self.compressed_cache(context[:, : -self.tail], mask)
            padded = mask is not None
            check_frequencies(self.method.label, self.model, cache, tokens, max_length - 1, padded=padded)
            generation_kwargs["past_key_values"] = cache
        generated: Tensor = super()._model_generate(context, max_length, stop, **generation_kwargs)
        return generated

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[_TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """lm-eval's hook: the log-probability of each continuation, and whether it is the greedy one."""
        scores: list[tuple[float, bool]] = []
        for texts, context, continuation in tqdm(requests, disable=disable_tqdm, desc="loglikelihood"):
            kept = (context + continuation)[-(self.max_length + 1) :]
            split = max(len(kept) - len(continuation) - self.tail, 0)
            ids = torch.tensor([kept[:-1]], device=self.model.device)
            with prompt_length(self.model, ids.shape[1]):
                cache = self.compressed_cache(ids[:, :split]) if split else None
                logits = self.model(input_ids=ids[:, split:], past_key_values=cache).logits[0, -len(continuation) :]
            score = _score(logits, continuation)
            scores.append(score)
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refused: every token is scored, so that there is no context to compress.

        Raises:
            UserError: always.
        """
        raise UserError(
            "tasks that score a whole text leave no context to compress: take one with a context and a continuation, "
            "or the perplexity of `kvgauge merge`"
        )


def _method_options(options: dict[str, Any]) -> list[str]:
    return [name for name in options if name.startswith(_METHOD_PREFIX)]


def _score(logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """The log-probability of `continuation` under logits (tokens, vocabulary), and whether it is the greedy one."""
    wanted = torch.tensor(continuation, device=logits.device)
    probabilities = torch.log_softmax(logits.float(), dim=-1)
    chosen = probabilities.gather(1, wanted[:, None]).sum()
    return float(chosen), bool((logits.argmax(dim=-1) == wanted).all())
