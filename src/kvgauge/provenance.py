"""What identifies each artifact: everything that can change its content, and nothing else.

The stage that makes an artifact and the stages that look for it build the same dict here.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgauge import artifacts, configuration
from kvgauge.configuration import digest, plain
from kvgauge.contract import fitting
from kvgauge.contract.benchmark import as_benchmark
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.identity import config, fit_version, method_version
from kvgauge.contract.method import Method
from kvgauge.errors import UserError
from kvgauge.fingerprint import code_version
from kvgauge.kernels.cpu.library import available
from kvgauge.models.chat_template import template_values
from kvgauge.models.identity import model_fingerprint

PROJECTIONS = "projections.safetensors"  # the file of a fit

# Whatever the method, these make an answer: the loops around its cache, and what a model is given.
ANSWERING = ("kvgauge.evaluation.answering", "kvgauge.models.attaching")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer does: its backend, its chat template and the values given to it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    template = f"{tokenizer.chat_template}\0{digest(template_values(tokenizer))}"
    return hashlib.sha256(f"{text}\0{template}".encode()).hexdigest()[:16]


def prompts_config(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Identity of the benchmark prompts.

    Raises:
        UserError: a benchmark that cannot be built, or whose files are missing.
    """
    identity = as_benchmark(configuration.build(cfg.benchmark, "benchmark")).identity()
    return {
        "benchmark": plain(cfg.benchmark),
        **({"identity": identity} if identity else {}),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "code": benchmark_version(cfg, "kvgauge.prompts.length"),
    }


def benchmark_version(cfg: DictConfig, *more: str) -> str:
    """A hash of the sources that a benchmark's class reaches, and of those of the modules `more`.

    Raises:
        UserError: a class that stands in no module with a source.
    """
    target = str(cfg.benchmark._target_)
    try:
        return code_version(target.rpartition(".")[0], *more)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{target} is no class of a module with a source ({error.name}), so that nobody could tell its prompts "
            f"from another version's: put it into a .py file and import it"
        ) from error


def corpus_config(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, split: str) -> dict[str, Any]:
    """Identity of calibration tokens: ``split`` is ``calibration`` or ``validation``."""
    return {
        "corpus": plain(cfg.corpus),
        "split": split,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "code": code_version("kvgauge.corpora.corpus"),
    }


def moments_config(cfg: DictConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Identity of the second moments."""
    return {
        "corpus": digest(corpus_config(cfg, tokenizer, "calibration")),
        "model": model_fingerprint(model),
        "code": code_version("kvgauge.calibration.collecting"),
    }


def fit_config(
    cfg: DictConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method
) -> dict[str, Any]:
    """Identity of fitted projections."""
    return {
        "moments": digest(moments_config(cfg, model, tokenizer)),
        "fit": fitting.fit_config(method),
        "code": fit_version(method),
    }


def fit_directory(
    cfg: DictConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method, root: str | Path
) -> Path:
    """Where the projections of a method that learns stand below an artifacts directory.

    Raises:
        UserError: they were not fitted yet.
    """
    wanted = fit_config(cfg, model, tokenizer, method)
    return artifacts.find(root, "fit", wanted, fitting.fit_command(method))


def load_fit(
    cfg: DictConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method
) -> Fitted | None:
    """The projections that `method` needs, from the artifacts of ``cfg``; None where it learns nothing.

    Raises:
        UserError: they were not fitted yet.
    """
    if not fitting.learns(method):
        return None
    return Fitted.load(fit_directory(cfg, model, tokenizer, method, cfg.artifacts) / PROJECTIONS)


def merge_config(
    cfg: DictConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, methods: Sequence[Method]
) -> dict[str, Any]:
    """Identity of the fidelity of the caches of some methods."""
    return {
        "contexts": digest(corpus_config(cfg, tokenizer, "validation")),
        "fidelity": plain(cfg.fidelity),
        "model": model_fingerprint(model),
        "methods": [[config(method), method_version(method)] for method in methods],
        "code": code_version("kvgauge.measure.fidelity", *ANSWERING),
        "fits": [
            digest(fit_config(cfg, model, tokenizer, method)) if fitting.learns(method) else None for method in methods
        ],
        "kernels": kernels_answer(model),
    }


def cell_config(
    model: PreTrainedModel, method: Method, fit_fingerprint: str | None, compress_at: str, **more: Any
) -> dict[str, Any]:
    """Identity of the answers of one method at one setting, whatever the sample.

    Args:
        model: its fingerprint covers weights and dtype.
        method: configuration and code.
        fit_fingerprint: of the projections, for methods that learn.
        compress_at: ``context`` or ``prompt``.
        more: what else can change an answer, e.g. the chat template.
    """
    return {
        "model": model_fingerprint(model),
        "method": config(method),
        "code": method_version(method),
        "decoding": code_version(*ANSWERING),
        "fit": fit_fingerprint,
        "compress_at": compress_at,
        "kernels": kernels_answer(model),
        **more,
    }


def kernels_answer(model: PreTrainedModel) -> bool:
    """Compiled kernels compute what they can; they sum in another order than torch."""
    return model.device.type == "cpu" and available()


@lru_cache(maxsize=1)
def environment() -> Mapping[str, str]:
    """Versions of the libraries that numbers depend on, and the git revision where there is one."""
    names = ("kvgauge", "torch", "transformers", "lm-eval", "numpy")
    versions = {name: _version(name) for name in names}
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        versions["git"] = result.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        versions["git"] = "unknown"
    return versions


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # kvgauge itself, where it runs from its sources
