"""merge: a method's compressed caches of held-out contexts against the exact ones.

    kvgauge merge method=kqsvd fidelity.ranks=[48,32,24,16]
    kvgauge merge panel=demo

Writes ``merge/…/fidelity.json`` (seven errors per layer, for caches whose entries stand for single tokens) and
``merge/…/model.json`` (KL, perplexity and bytes).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgauge import artifacts, configuration, provenance
from kvgauge.architecture.facts import check_length, model_facts
from kvgauge.architecture.prompt_length import prompt_length
from kvgauge.configuration import digest
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import fit_config
from kvgauge.contract.method import Method
from kvgauge.contract.while_decoding import cell_label
from kvgauge.errors import UserError
from kvgauge.evaluation.panel import settings
from kvgauge.measure import fidelity
from kvgauge.methods.per_head.low_rank import LowRankPerHead
from kvgauge.models.loading import load_model
from kvgauge.stage import complete, stage, stage_directory
from kvgauge.tracking import track


def run(cfg: DictConfig) -> None:
    model, tokenizer = load_model(configuration.build(cfg.model, "model"))
    methods = [setting.method for setting in settings(cfg)]
    config = provenance.merge_config(cfg, model, tokenizer, methods)
    label = methods[0].name if len({method.name for method in methods}) == 1 else f"panel-{len(methods)}"
    directory = stage_directory(cfg, "merge", label, config)
    if complete(directory, config):
        return
    fits = {method.label: provenance.load_fit(cfg, model, tokenizer, method) for method in methods}
    error_rows: list[dict[str, Any]] = []
    model_rows: list[dict[str, Any]] = []
    pairs = contexts(cfg, model, tokenizer)
    longest = cfg.fidelity.context_length + cfg.fidelity.continuation
    with prompt_length(model, longest), tqdm(total=len(pairs) * len(methods), desc="merge", unit="cell") as bar:
        for sequence, (context, continuation) in enumerate(pairs):
            projected: set[tuple[Any, ...]] = set()  # whose pairs were measured at the ranks asked for
            for method in methods:
                bar.set_postfix_str(method.label)
                facts = {"model": cfg.model.name, "method": method.name, "sequence": sequence}
                fitted = fits[method.label]
                if isinstance(method, LowRankPerHead) and fitted is not None and model_facts(model).latent is None:
                    ranks = [(rank, rank) for rank in cfg.fidelity.ranks]
                    kind = (method.name, digest(fit_config(method)))
                    if kind not in projected:
                        projected.add(kind)
                        rows = fidelity.projection_errors(model, fitted, method.rope, ranks, context)
                        error_rows += [row | facts | {"budget": None} for row in rows]
                if not (isinstance(method, LowRankPerHead) and method.rope == "pre"):
                    errors, measured = measure(model, method, fitted, context, continuation)
                    error_rows += [facts | row for row in errors]
                    model_rows.append(facts | measured)
                bar.update()
    artifacts.begin(directory)
    artifacts.write_json(directory / "fidelity.json", error_rows)
    artifacts.write_json(directory / "model.json", model_rows)
    artifacts.finish(directory, "merge", config)
    track(cfg, directory)
    print(directory)


def measure(
    model: PreTrainedModel, method: Method, fitted: Fitted | None, context: Tensor, continuation: Tensor
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The errors per layer of one cell's cache, and what the model makes of it."""
    cell = {"cell": cell_label(method), "budget": method.budget}
    cache = fidelity.compress_context(model, method, fitted, context)
    ranks_of = chosen_ranks(method, fitted, model, context.shape[1])
    errors: list[dict[str, Any]] = []
    try:
        errors = [cell | ranks_of[int(str(row["layer"]))] | row for row in fidelity.cache_errors(model, cache, context)]
    except UserError as refusal:  # entries of merged caches stand for several tokens
        tqdm.write(f"{method.label}: no errors per layer: {refusal}")
    measured = fidelity.model_fidelity(model, method, cache, context, continuation)
    return errors, cell | ranks_of[0] | asdict(measured) | cache.remarks()


def contexts(
    cfg: DictConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[Tensor, Tensor]]:
    """Held-out (context, continuation) pairs, each (1, tokens)."""
    wanted = provenance.corpus_config(cfg, tokenizer, "validation")
    source = artifacts.find(cfg.artifacts, "corpus", wanted, "kvgauge prepare")
    tokens = artifacts.read_tensors(source / "tokens.safetensors")[0]["tokens"]
    length, more = cfg.fidelity.context_length, cfg.fidelity.continuation
    check_length(model, length + more, "a held-out context with its continuation")
    if tokens.shape[0] < cfg.fidelity.contexts or tokens.shape[1] < length + more:
        raise UserError(
            f"the validation split has {tokens.shape[0]} sequences of {tokens.shape[1]} tokens, fewer than "
            f"{cfg.fidelity.contexts} of {length + more}: raise corpus.num_sequences or corpus.sequence_length"
        )
    chosen = tokens[: cfg.fidelity.contexts, : length + more].to(model.device)
    return [(row[None, :length], row[None, length:]) for row in chosen]


def chosen_ranks(
    method: Method, fitted: Fitted | None, model: PreTrainedModel, tokens: int
) -> list[dict[str, int | None]]:
    """rank_k and rank_v of every layer where a method has them."""
    facts = model_facts(model)
    if not isinstance(method, LowRankPerHead) or fitted is None:
        return [{"rank_k": None, "rank_v": None}] * facts.num_layers
    ranks = method.ranks(fitted, facts, tokens)
    return [{"rank_k": rank_k, "rank_v": rank_v} for rank_k, rank_v in ranks]


if __name__ == "__main__":
    stage(run)()
