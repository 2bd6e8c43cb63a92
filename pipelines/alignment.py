"""alignment: how alike layers are, token by token and in the subspaces that xKV shares, on the calibration tokens.

    python -m pipelines.prepare experiment=xkv_alignment
    python -m pipelines.alignment experiment=xkv_alignment

Writes ``alignment/…/alignment.json`` (layer × layer matrices by name) and ``alignment.png``.
"""

from __future__ import annotations

from omegaconf import DictConfig

import kvgauge
from kvgauge import artifacts, configuration, provenance
from kvgauge.configuration import digest
from kvgauge.measure import alignment
from kvgauge.models.facts import model_fingerprint
from kvgauge.report.plots import alignment as plot
from kvgauge.report.plots.style import to_png
from kvgauge.stage import complete, stage, stage_directory
from kvgauge.tracking import track

RANK = 64  # dominant directions compared: a third of SmolLM2's 192 features


def run(cfg: DictConfig) -> None:
    model, tokenizer = kvgauge.load_model(configuration.build(cfg.model, "model"))
    corpus = provenance.corpus_config(cfg, tokenizer, "calibration")
    rank = cfg.get("alignment_rank", RANK)
    config = {
        "corpus": digest(corpus),
        "model": model_fingerprint(model),
        "rank": rank,
        "code": provenance.source_version(alignment, plot),
    }
    directory = stage_directory(cfg, "alignment", f"{cfg.model.name}-{cfg.corpus.name}", config)
    if complete(directory, config):
        return
    source = artifacts.find(cfg.artifacts, "corpus", corpus, "python -m pipelines.prepare")
    tokens = artifacts.read_tensors(source / "tokens.safetensors")[0]["tokens"]
    matrices = alignment.layer_alignment(model, tokens.split(1), rank, progress=True)
    as_lists = {name: matrix.tolist() for name, matrix in matrices.items()}
    artifacts.begin(directory)
    artifacts.write_json(directory / "alignment.json", as_lists)
    with artifacts.replacing(directory / "alignment.png") as temporary:
        temporary.write_bytes(to_png(plot.alignment(as_lists)))
    artifacts.finish(
        directory,
        "alignment",
        config,
        title=f"Layers of {cfg.model.name}",
        caption=f"Layer against layer, keys before the rotation: the cosine of the same token, centred kernel "
        f"alignment, and the mean squared cosine of the principal angles between the {rank} dominant left "
        f"singular vectors (unrelated subspaces: {rank / tokens.shape[1]:.2f}).",
    )
    track(cfg, directory)
    print(directory)


if __name__ == "__main__":
    stage(run)()
