"""merge: a method's compressed caches of held-out contexts against the exact ones.

    kvgauge merge method=kqsvd fidelity.ranks=[48,32,24,16]

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
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.method import Method
from kvgauge.errors import UserError
from kvgauge.measure import fidelity
from kvgauge.methods.per_head.low_rank import LowRankPerHead
from kvgauge.methods.registry import as_method
from kvgauge.models.loading import load_model
from kvgauge.stage import complete, stage, stage_directory
from kvgauge.tracking import track


def run(cfg: DictConfig) -> None:
    model, tokenizer = load_model(configuration.build(cfg.model, "model"))
    method = as_method(configuration.build(cfg.method, "method"))
    config = provenance.merge_config(cfg, model, tokenizer, method)
    directory = stage_directory(cfg, "merge", method.label, config)
    if complete(directory, config):
        return
    fitted = provenance.load_fit(cfg, model, tokenizer, method)
    budgets = list(cfg.budgets or [method.budget])
    error_rows: list[dict[str, Any]] = []
    model_rows: list[dict[str, Any]] = []
    for sequence, (context, continuation) in enumerate(tqdm(contexts(cfg, model, tokenizer), desc="merge")):
        facts = {"model": cfg.model.name, "method": method.name, "sequence": sequence}
        if isinstance(method, LowRankPerHead) and fitted is not None and model_facts(model).latent is None:
            ranks = [(rank, rank) for rank in cfg.fidelity.ranks]
            for row in fidelity.projection_errors(model, fitted, method.rope, ranks, context):
                error_rows.append(row | facts | {"budget": None})
            if method.rope == "pre":
                continue
        for budget in budgets:
            chosen = method.sized(budget)
            cell = facts | {"cell": chosen.label, "budget": budget}
            cache = fidelity.compress_context(model, chosen, fitted, context)
            ranks_of = chosen_ranks(chosen, fitted, model, context.shape[1])
            try:
                error_rows += [
                    cell | ranks_of[int(str(r["layer"]))] | r for r in fidelity.cache_errors(model, cache, context)
                ]
            except UserError as refusal:  # entries of merged caches stand for several tokens
                tqdm.write(f"{chosen.label}: no errors per layer: {refusal}")
            measured = fidelity.model_fidelity(model, chosen, cache, context, continuation)
            model_rows.append(cell | ranks_of[0] | asdict(measured) | cache.remarks())
    artifacts.begin(directory)
    artifacts.write_json(directory / "fidelity.json", error_rows)
    artifacts.write_json(directory / "model.json", model_rows)
    artifacts.finish(directory, "merge", config)
    track(cfg, directory)
    print(directory)


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
    ranks = method.ranks(fitted, facts.num_layers, facts.head_dim, tokens)
    return [{"rank_k": rank_k, "rank_v": rank_v} for rank_k, rank_v in ranks]


if __name__ == "__main__":
    stage(run)()
