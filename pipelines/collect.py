"""collect: second moments of keys, queries and values on the calibration tokens.

    kvgauge collect corpus=essays corpus.num_sequences=8

Writes ``collect/…/moments.safetensors``: the moments, and a few of the sequences for fits that need more.
"""

from __future__ import annotations

from dataclasses import replace

from omegaconf import DictConfig

from kvgauge import artifacts, configuration, provenance
from kvgauge.calibration.collecting import collect
from kvgauge.models.loading import load_model
from kvgauge.stage import complete, stage, stage_directory


def run(cfg: DictConfig) -> None:
    model, tokenizer = load_model(configuration.build(cfg.model, "model"))
    config = provenance.moments_config(cfg, model, tokenizer)
    directory = stage_directory(cfg, "collect", f"{cfg.model.name}-{cfg.corpus.name}", config)
    if complete(directory, config):
        return
    corpus = provenance.corpus_config(cfg, tokenizer, "calibration")
    source = artifacts.find(cfg.artifacts, "corpus", corpus, "kvgauge prepare")
    tensors = artifacts.read_tensors(source / "tokens.safetensors")[0]
    held_out = tensors["held_out"] if len(tensors["held_out"]) else None
    moments = collect(model, tensors["tokens"].split(1), held_out=held_out, progress=True)
    artifacts.begin(directory)
    names = {"model_name": cfg.model.name, "corpus": cfg.corpus.name}
    named = replace(moments, metadata=moments.metadata | names)
    named.save(directory / "moments.safetensors")
    artifacts.finish(directory, "collect", config, tokens=moments.tokens)
    print(directory)


if __name__ == "__main__":
    stage(run)()
