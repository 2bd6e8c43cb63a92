"""fit: what a method learns from the moments.

    kvgauge fit -m method=ksvd,eigen,kqsvd
    kvgauge fit panel=demo

Writes ``fit/…/projections.safetensors``: pairs at full rank, of which any budget takes a prefix, and their spectra. A
method that learns nothing writes nothing; of a panel, every method that learns writes one, cells that share a fit
together.
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from kvgauge import artifacts, configuration, provenance
from kvgauge.calibration.moments import Moments
from kvgauge.configuration import digest
from kvgauge.contract.fitting import learns
from kvgauge.contract.method import Method
from kvgauge.contract.roles import fitter_of
from kvgauge.evaluation.panel import settings
from kvgauge.models.loading import load_model
from kvgauge.stage import complete, stage, stage_directory


def run(cfg: DictConfig) -> None:
    methods = [setting.method for setting in settings(cfg)]
    learning = [method for method in methods if learns(method)]
    if not learning:
        names = ", ".join(dict.fromkeys(method.name for method in methods))
        print(f"{names}: nothing to learn, no fit is needed", file=sys.stderr)
        return
    model, tokenizer = load_model(configuration.build(cfg.model, "model"))
    fits: dict[str, Method] = {}
    for method in learning:
        fits.setdefault(digest(provenance.fit_config(cfg, model, tokenizer, method)), method)
    moments: Moments | None = None
    for method in fits.values():
        config = provenance.fit_config(cfg, model, tokenizer, method)
        directory = stage_directory(cfg, "fit", method.name, config)
        if cfg.out and cfg.panel is not None:
            directory /= f"{fitter_of(method).name}-{digest(config)[:8]}"
        if not complete(directory, config):
            if moments is None:
                wanted = provenance.moments_config(cfg, model, tokenizer)
                source = artifacts.find(cfg.artifacts, "collect", wanted, "kvgauge collect")
                moments = Moments.load(source / "moments.safetensors")
            fitted = method.fit(moments, model)
            assert fitted is not None
            artifacts.begin(directory)
            fitted.save(directory / provenance.PROJECTIONS)
            artifacts.finish(directory, "fit", config, floored_eigenvalues=fitted.metadata.get("floored_eigenvalues"))
        print(directory)


if __name__ == "__main__":
    stage(run)()
