"""check: whether a model is measured right, by which methods, and why others refuse it.

    kvgauge check model=smollm2-135m
    kvgauge check tiny/llama tiny/qwen3 model.device=cuda
    kvgauge check --architectures
    kvgauge check --architectures --only gemma3 gpt_oss --json
    kvgauge check tiny/llama --methods all

A model is compared with transformers' own attention and cache on random tokens, then every family of methods at its
lossless setting and at half the bytes. `--architectures` does so for tiny random models of every architecture that
kvgauge knows how to make. The exit code is 1 where a number would be wrong or a method breaks off, else 0.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm
from transformers import PreTrainedModel

from kvgauge.configuration import plain
from kvgauge.errors import UserError, unknown
from kvgauge.measure.serving import BROKEN, METHODS, REFUSED, RIGHT, WRONG, Finding, all_methods, findings
from kvgauge.models.attaching import attach
from kvgauge.models.loading import load_model, model_spec
from kvgauge.models.spec import ModelSpec
from kvgauge.models.zoo import ARCHITECTURES, zoo_model
from kvgauge.stage import CommandParser, fail

WIDTH = 15
PRESSES = "kvpress/"
NAMED = 6  # methods that a reason names, of a model

Methods = Mapping[str, Mapping[str, object]]


def main() -> None:
    """Print a line per model as it is done, then one JSON line."""
    parser = CommandParser(__doc__)
    parser.add_argument(
        "models",
        nargs="*",
        help="names of conf/model, hub ids, directories or .gguf files; model.<field>=… for all",
    )
    parser.add_argument("--architectures", action="store_true", help="tiny random models of every architecture")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the architectures only these")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="these instead of one of every family; all: every method and press"
    )
    parser.add_argument("--json", action="store_true", help="the JSON line only")
    options = parser.parse_args()
    models = [name.removeprefix("model=") for name in options.models if not name.startswith("model.")]
    if not models and not options.architectures and not options.only:
        parser.error("name a model, or say --architectures")
    names = options.only or (list(ARCHITECTURES) if options.architectures else [])
    rows: list[dict[str, Any]] = []
    try:
        methods = _methods(options.methods)
        specs = [_spec(name, [text for text in options.models if text.startswith("model.")]) for name in models]
    except UserError as error:
        fail(str(error))
    if not options.json:
        print(f"{'':28}" + "".join(f"{method:<{_width(method)}}" for method in methods))
    try:
        for name, found in tqdm(_found(specs, names, methods), total=len(names) + len(models), disable=None):
            rows += [{"model": name, **asdict(finding)} for finding in found]
            if not options.json:
                print(_line(name, found))
                sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    if not options.json:
        _print_reasons(rows)
    print(json.dumps(summary(rows) | ({"rows": rows} if options.json else {})))
    sys.exit(any(row["verdict"] in (WRONG, BROKEN) for row in rows))


def _methods(names: list[str] | None) -> Methods:
    """The methods to try.

    Raises:
        UserError: an unknown name.
    """
    if names is None:
        return METHODS
    known = all_methods()
    for name in names:
        if name != "all" and name not in known:
            raise unknown("method", name, known)
    return known if "all" in names else {name: known[name] for name in names}


def _width(method: str) -> int:
    return max(WIDTH, len(method) + 2)


def _spec(name: str, overrides: list[str]) -> ModelSpec:
    """A model, in float32 unless an override says otherwise.

    Raises:
        UserError: no such name, or a field or its value is wrong.
    """
    fields = plain(OmegaConf.from_dotlist(overrides)).get("model", {})
    return model_spec(name, **{"dtype": "float32"} | fields)


def _found(models: list[ModelSpec], architectures: list[str], methods: Methods) -> Iterator[tuple[str, list[Finding]]]:
    for spec in models:
        try:
            model, _ = load_model(spec)
        except UserError as error:
            yield spec.name, [Finding(method, REFUSED, str(error)) for method in methods]
            continue
        yield spec.name, findings(model, methods)
    for name in architectures:
        yield name, findings(_attached(name), methods)


def _attached(name: str) -> PreTrainedModel:
    model = zoo_model(name)
    attach(model)
    return model


def _line(name: str, found: list[Finding]) -> str:
    return f"{name:<28}" + "".join(f"{finding.verdict:<{_width(finding.method)}}" for finding in found)


def _print_reasons(rows: list[dict[str, Any]]) -> None:
    """Every reason once, with those that it stands for: of each model its methods, many of them as their number."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row["verdict"] != RIGHT:
            reason = re.sub(rf"\b{re.escape(row['method'])}\b", "…", row["reason"])
            reasons.setdefault(f"{row['verdict']}: {reason}", {}).setdefault(row["model"], []).append(row["method"])
    for reason, models in reasons.items():
        cells = [
            f"{model} {' '.join(methods) if len(methods) <= NAMED else f'({len(methods)} methods)'}"
            for model, methods in models.items()
        ]
        print(f"\n{', '.join(cells)}\n  {reason}")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many models are right in every family, and how many cells are of each verdict."""
    by_model: dict[str, set[str]] = {}
    without_presses: dict[str, set[str]] = {}
    for row in rows:
        by_model.setdefault(row["model"], set()).add(row["verdict"])
        if not row["method"].startswith(PRESSES):
            without_presses.setdefault(row["model"], set()).add(row["verdict"])
    verdicts = Counter(row["verdict"] for row in rows)
    return {
        "models": len(by_model),
        "right_in_every_family": sum(found == {RIGHT} for found in by_model.values()),
        "right_without_presses": sum(found == {RIGHT} for found in without_presses.values()),
        "right_or_refused": sum(found <= {RIGHT, REFUSED} for found in by_model.values()),
        **{verdict: verdicts[verdict] for verdict in (RIGHT, REFUSED, WRONG, BROKEN)},
    }
