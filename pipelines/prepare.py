"""prepare: benchmark prompts and calibration tokens.

    kvgauge prepare benchmark.lengths=[2048] benchmark.samples=20

Writes ``prompts/…/samples.jsonl`` and, for each split, ``corpus/…/tokens.safetensors``.
"""

from __future__ import annotations

from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kvgauge import artifacts, configuration, provenance
from kvgauge.contract.benchmark import as_benchmark
from kvgauge.corpora.corpus import Split, load_corpus, load_held_out
from kvgauge.models.loading import load_tokenizer
from kvgauge.prompts.length import TokenCounter
from kvgauge.stage import complete, stage, stage_directory

SPLITS: tuple[Split, ...] = ("calibration", "validation")


def run(cfg: DictConfig) -> None:
    tokenizer = load_tokenizer(configuration.build(cfg.model, "model"))
    prepare_prompts(cfg, tokenizer)
    for split in SPLITS:
        prepare_corpus(cfg, tokenizer, split)


def prepare_prompts(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    benchmark = as_benchmark(configuration.build(cfg.benchmark, "benchmark"))
    config = provenance.prompts_config(cfg, tokenizer)
    directory = stage_directory(cfg, "prompts", benchmark.name, config)
    if complete(directory, config):
        return
    samples = benchmark.prompts(TokenCounter(tokenizer, chat=benchmark.chat))
    rows = [sample.to_dict() for sample in tqdm(samples, desc="prompts", unit="sample", total=benchmark.total)]
    artifacts.begin(directory)
    artifacts.write_lines(directory / "samples.jsonl", rows)
    artifacts.finish(directory, "prompts", config, samples=len(rows))
    print(directory)


def prepare_corpus(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, split: Split) -> None:
    config = provenance.corpus_config(cfg, tokenizer, split)
    directory = stage_directory(cfg, "corpus", f"{cfg.corpus.name}-{split}", config, suffix=f"-{split}")
    if complete(directory, config):
        return
    corpus = configuration.build(cfg.corpus, "corpus")
    tokens = load_corpus(corpus, tokenizer, split)
    tensors: dict[str, Tensor] = {"tokens": tokens}
    if split == "calibration":
        tensors["held_out"] = load_held_out(corpus, tokenizer)
    artifacts.begin(directory)
    artifacts.write_tensors(directory / "tokens.safetensors", tensors, {"split": split})
    artifacts.finish(directory, "corpus", config, sequences=tokens.shape[0], sequence_length=tokens.shape[1])
    print(directory)


if __name__ == "__main__":
    stage(run)()
