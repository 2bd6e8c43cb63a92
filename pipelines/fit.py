"""fit: what a method learns from the moments.

    kvgauge fit -m method=ksvd,eigen,kqsvd

Writes ``fit/…/projections.safetensors``: pairs at full rank, of which any budget takes a prefix, and their spectra. A
method that learns nothing writes nothing.
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from kvgauge import artifacts, configuration, provenance
from kvgauge.calibration.moments import Moments
from kvgauge.contract.fitting import learns
from kvgauge.methods.registry import as_method
from kvgauge.models.loading import load_model
from kvgauge.stage import complete, stage, stage_directory


def run(cfg: DictConfig) -> None:
    method = as_method(configuration.build(cfg.method, "method"))
    if not learns(method):
        print(f"{method.name} learns nothing: no fit is needed", file=sys.stderr)
        return
    model, tokenizer = load_model(configuration.build(cfg.model, "model"))
    config = provenance.fit_config(cfg, model, tokenizer, method)
    directory = stage_directory(cfg, "fit", method.name, config)
    if complete(directory, config):
        return
    wanted = provenance.moments_config(cfg, model, tokenizer)
    source = artifacts.find(cfg.artifacts, "collect", wanted, "kvgauge collect")
    fitted = method.fit(Moments.load(source / "moments.safetensors"), model)
    assert fitted is not None
    artifacts.begin(directory)
    fitted.save(directory / "projections.safetensors")
    artifacts.finish(directory, "fit", config, floored_eigenvalues=fitted.metadata.get("floored_eigenvalues"))
    print(directory)


if __name__ == "__main__":
    stage(run)()
