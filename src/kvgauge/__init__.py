"""kvgauge: KV-cache compression measured side by side, as real caches on the same prompts at the same bytes.

Names are imported when they are first used: the command's help and its completions need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvgauge.architecture.facts import full_nbytes
    from kvgauge.calibration.collecting import collect
    from kvgauge.calibration.moments import Moments
    from kvgauge.contract.benchmark import Benchmark
    from kvgauge.contract.fitted import Fitted
    from kvgauge.contract.method import Method
    from kvgauge.errors import UserError
    from kvgauge.evaluation.generation import generate
    from kvgauge.methods.registry import build_method, list_methods
    from kvgauge.models.loading import load_model, load_tokenizer
    from kvgauge.prompts.samples import Sample

_MODULES = {
    "Benchmark": "contract.benchmark",
    "Fitted": "contract.fitted",
    "Method": "contract.method",
    "Moments": "calibration.moments",
    "Sample": "prompts.samples",
    "UserError": "errors",
    "build_method": "methods.registry",
    "collect": "calibration.collecting",
    "full_nbytes": "architecture.facts",
    "generate": "evaluation.generation",
    "list_methods": "methods.registry",
    "load_model": "models.loading",
    "load_tokenizer": "models.loading",
}

__all__ = [
    "Benchmark",
    "Fitted",
    "Method",
    "Moments",
    "Sample",
    "UserError",
    "build_method",
    "collect",
    "full_nbytes",
    "generate",
    "list_methods",
    "load_model",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
