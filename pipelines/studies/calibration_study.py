"""What the studies of a model on its calibration tokens have in common: one JSON file, one picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge import artifacts, configuration, provenance
from kvgauge.architecture.facts import check_length
from kvgauge.configuration import digest
from kvgauge.fingerprint import code_version
from kvgauge.models.identity import model_fingerprint
from kvgauge.models.loading import load_model
from kvgauge.report.plots.style import to_png
from kvgauge.stage import complete, stage_directory
from kvgauge.tracking import track


def calibration_study(
    cfg: DictConfig,
    name: str,
    study: Callable[[PreTrainedModel, Tensor], Any],
    draw: Callable[[Any], Figure],
    describe: Callable[[Tensor], Mapping[str, str]],
    *,
    code: tuple[ModuleType, ...],
    **identity: Any,
) -> None:
    """Write ``<name>/…/<name>.json`` and ``<name>.png``, once, and print the directory.

    Args:
        cfg: the run's configuration; `prepare` has made its calibration tokens.
        name: of the study.
        study: what is found, as JSON takes it, for a model and tokens (sequences, length).
        draw: the picture of that.
        describe: its ``title`` and ``caption`` in the report, for the tokens.
        code: modules whose sources are part of the artifact's identity.
        identity: what else is.

    Raises:
        UserError: the tokens are missing, or longer than the model's positions.
    """
    model, tokenizer = load_model(configuration.build(cfg.model, "model"))
    corpus = provenance.corpus_config(cfg, tokenizer, "calibration")
    config = {
        "corpus": digest(corpus),
        "model": model_fingerprint(model),
        "code": code_version(*(module.__name__ for module in code)),
    } | identity
    directory = stage_directory(cfg, name, f"{cfg.model.name}-{cfg.corpus.name}", config)
    if complete(directory, config):
        return
    source = artifacts.find(cfg.artifacts, "corpus", corpus, "kvgauge prepare")
    tokens = artifacts.read_tensors(source / "tokens.safetensors")[0]["tokens"]
    check_length(model, tokens.shape[1], "a calibration sequence")
    found = study(model, tokens)
    artifacts.begin(directory)
    artifacts.write_json(directory / f"{name}.json", found)
    with artifacts.replacing(directory / f"{name}.png") as temporary:
        temporary.write_bytes(to_png(draw(found)))
    artifacts.finish(directory, name, config, **describe(tokens))
    track(cfg, directory)
    print(directory)
