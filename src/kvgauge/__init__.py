"""kvgauge: KV-cache compression measured side by side, as real caches on the same prompts at the same bytes."""

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
