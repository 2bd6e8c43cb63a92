"""What identifies each artifact: everything that can change its content, and nothing else.

The stage that makes an artifact and the stages that look for it build the same dict here.
"""

from __future__ import annotations

import hashlib
import inspect
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgauge import artifacts, calibration
from kvgauge.calibration import collecting, moments
from kvgauge.configuration import digest, plain
from kvgauge.measure import fidelity
from kvgauge.methods.base import Method
from kvgauge.methods.fitted import Fitted
from kvgauge.models.facts import model_fingerprint
from kvgauge.native.library import available


def source_version(*modules: ModuleType | Path) -> str:
    """A hash of the sources of modules (or of all Python files below a directory)."""
    value = hashlib.sha256()
    for module in modules:
        path = module if isinstance(module, Path) else Path(inspect.getfile(module))
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            value.update(file.name.encode() + b"\0" + file.read_bytes())
    return value.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer does: its backend and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{text}\0{tokenizer.chat_template}".encode()).hexdigest()[:16]


def prompts_config(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Identity of the benchmark prompts."""
    from kvgauge.benchmarks import prompt_length, questions, sample, sources
    from kvgauge.evaluation import prompting, samples

    package = Path(inspect.getfile(get_class(cfg.benchmark._target_))).parent
    return {
        "benchmark": plain(cfg.benchmark),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "code": source_version(package, sample, samples, sources, questions, prompt_length, prompting),
    }


def corpus_config(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, split: str) -> dict[str, Any]:
    """Identity of calibration tokens: ``split`` is ``calibration`` or ``validation``."""
    package = Path(inspect.getfile(calibration)).parent
    return {
        "corpus": plain(cfg.corpus),
        "split": split,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "code": source_version(package / "corpora.py"),
    }


def moments_config(cfg: DictConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Identity of the second moments."""
    return {
        "corpus": digest(corpus_config(cfg, tokenizer, "calibration")),
        "model": model_fingerprint(model),
        "code": source_version(collecting, moments),
    }


def fit_config(
    cfg: DictConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method
) -> dict[str, Any]:
    """Identity of fitted projections."""
    return {
        "moments": digest(moments_config(cfg, model, tokenizer)),
        "fit": method.fitter.fit_config(),
        "code": method.fitter.fit_code_version(),
    }


def load_fit(
    cfg: DictConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method
) -> Fitted | None:
    """The projections that `method` needs, from the artifacts of ``cfg``; None where it learns nothing.

    Raises:
        UserError: they were not fitted yet.
    """
    if not method.learns:
        return None
    wanted = fit_config(cfg, model, tokenizer, method)
    directory = artifacts.find(cfg.artifacts, "fit", wanted, method.fitter.fit_command)
    return Fitted.load(directory / "projections.safetensors")


def merge_config(
    cfg: DictConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method
) -> dict[str, Any]:
    """Identity of the fidelity of a method's caches."""
    return {
        "contexts": digest(corpus_config(cfg, tokenizer, "validation")),
        "fidelity": plain(cfg.fidelity),
        "budgets": plain(cfg.budgets),
        "model": model_fingerprint(model),
        "method": method.config(),
        "code": [method.code_version(), source_version(fidelity)],
        "fit": digest(fit_config(cfg, model, tokenizer, method)) if method.learns else None,
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
    from kvgauge import evaluation

    package = Path(inspect.getfile(evaluation)).parent
    decoding = source_version(*(package / f"{name}.py" for name in ("answering", "decoding", "prompting")))
    return {
        "model": model_fingerprint(model),
        "method": method.config(),
        "code": method.code_version(),
        "decoding": decoding,
        "fit": fit_fingerprint,
        "compress_at": compress_at,
        "kernels": model.device.type == "cpu" and available(),  # they sum in another order
        **more,
    }


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
