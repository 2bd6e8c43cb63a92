"""Tasks of lm-evaluation-harness as a benchmark: its documents, prompts, few shots, filters and metrics."""

from kvgauge.benchmarks.lm_eval_task.lm_eval_task import LmEval

__all__ = ["LmEval"]
