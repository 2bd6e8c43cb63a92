"""asymmetry: why keys merge and values do not, on the calibration tokens.

    python -m pipelines.prepare experiment=kvslimmer_asymmetry
    python -m pipelines.asymmetry experiment=kvslimmer_asymmetry

Writes ``asymmetry/…/asymmetry.json`` (spectra of the projections, cosines of adjacent tokens) and ``asymmetry.png``.
"""

from __future__ import annotations

from omegaconf import DictConfig

import kvgauge
from kvgauge import artifacts, configuration, provenance
from kvgauge.configuration import digest
from kvgauge.measure import asymmetry
from kvgauge.models.facts import check_length, model_fingerprint
from kvgauge.report.plots import asymmetry as plot
from kvgauge.report.plots.style import to_png
from kvgauge.stage import complete, stage, stage_directory
from kvgauge.tracking import track


def run(cfg: DictConfig) -> None:
    model, tokenizer = kvgauge.load_model(configuration.build(cfg.model, "model"))
    corpus = provenance.corpus_config(cfg, tokenizer, "calibration")
    config = {
        "corpus": digest(corpus),
        "model": model_fingerprint(model),
        "code": provenance.source_version(asymmetry, plot),
    }
    directory = stage_directory(cfg, "asymmetry", f"{cfg.model.name}-{cfg.corpus.name}", config)
    if complete(directory, config):
        return
    source = artifacts.find(cfg.artifacts, "corpus", corpus, "python -m pipelines.prepare")
    tokens = artifacts.read_tensors(source / "tokens.safetensors")[0]["tokens"]
    check_length(model, tokens.shape[1], "a calibration sequence")
    rows = asymmetry.weight_rows(model) + asymmetry.cosine_rows(model, tokens.split(1))
    artifacts.begin(directory)
    artifacts.write_json(directory / "asymmetry.json", rows)
    with artifacts.replacing(directory / "asymmetry.png") as temporary:
        temporary.write_bytes(to_png(plot.asymmetry(rows)))
    artifacts.finish(
        directory,
        "asymmetry",
        config,
        title=f"Keys and values of {cfg.model.name}",
        caption="Spectra of the projections head by head, and cosines of the keys and values of adjacent tokens.",
    )
    track(cfg, directory)
    print(directory)


if __name__ == "__main__":
    stage(run)()
