"""alignment: how alike layers are, token by token and in the subspaces that xKV shares, on the calibration tokens.

    kvgauge prepare experiment=xkv_alignment
    python -m pipelines.studies.alignment experiment=xkv_alignment

Writes ``alignment/…/alignment.json`` (layer × layer matrices by name) and ``alignment.png``.
"""

from __future__ import annotations

from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from kvgauge.measure import alignment
from kvgauge.report.plots import alignment as plot
from kvgauge.stage import stage

from .calibration_study import calibration_study

RANK = 64  # dominant directions compared: a third of SmolLM2's 192 features


def run(cfg: DictConfig) -> None:
    rank = cfg.get("alignment_rank", RANK)

    def study(model: PreTrainedModel, tokens: Tensor) -> dict[str, list[list[float]]]:
        matrices = alignment.layer_alignment(model, tokens.split(1), rank, progress=True)
        return {name: matrix.tolist() for name, matrix in matrices.items()}

    def describe(tokens: Tensor) -> dict[str, str]:
        return {
            "title": f"Layers of {cfg.model.name}",
            "caption": "Layer against layer, keys before the rotation: the cosine of the same token, centred kernel "
            f"alignment, and the mean squared cosine of the principal angles between the {rank} dominant left "
            f"singular vectors (unrelated subspaces: {rank / tokens.shape[1]:.2f}).",
        }

    calibration_study(cfg, "alignment", study, plot.alignment, describe, code=(alignment, plot), rank=rank)


if __name__ == "__main__":
    stage(run)()
