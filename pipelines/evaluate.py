"""evaluate: what every cell answers to the benchmark's prompts.

    kvgauge evaluate method=kqsvd method.budget=0.5
    kvgauge evaluate panel='[{method: full},{method: ksvd, budget: 0.5}]'

Writes ``evaluate/…/samples.jsonl`` (a row per cell and sample), ``cells.json`` (means, intervals, paired differences)
and ``timings.jsonl`` (seconds, which no two runs share).
"""

from __future__ import annotations

from omegaconf import DictConfig

from kvgauge.evaluation.run import evaluate
from kvgauge.stage import stage
from kvgauge.tracking import track


def run(cfg: DictConfig) -> None:
    directory = evaluate(cfg)
    if directory is not None:
        track(cfg, directory)
        print(directory)


if __name__ == "__main__":
    stage(run)()
