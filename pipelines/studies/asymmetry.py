"""asymmetry: why keys merge and values do not, on the calibration tokens.

    kvgauge prepare experiment=kvslimmer_asymmetry
    python -m pipelines.studies.asymmetry experiment=kvslimmer_asymmetry

Writes ``asymmetry/…/asymmetry.json`` (spectra of the projections, cosines of adjacent tokens) and ``asymmetry.png``.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.measure import asymmetry
from kvgauge.report.plots import asymmetry as plot
from kvgauge.stage import stage

from .calibration_study import calibration_study


def run(cfg: DictConfig) -> None:
    def study(model: PreTrainedModel, tokens: Tensor) -> list[dict[str, Any]]:
        return asymmetry.weight_rows(model) + asymmetry.cosine_rows(model, tokens.split(1))

    def describe(tokens: Tensor) -> dict[str, str]:
        return {
            "title": f"Keys and values of {cfg.model.name}",
            "caption": "Spectra of the projections head by head, "
            "and cosines of the keys and values of adjacent tokens.",
        }

    calibration_study(cfg, "asymmetry", study, plot.asymmetry, describe, code=(asymmetry, plot))


if __name__ == "__main__":
    stage(run)()
