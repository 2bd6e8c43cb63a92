"""RULER (Hsieh et al., arXiv 2404.06654): its 13 tasks at any length and any number of samples, seeded."""

from kvgauge.benchmarks.ruler.config import RulerConfig
from kvgauge.benchmarks.ruler.generation import generate
from kvgauge.benchmarks.ruler.spec import TaskSpec
from kvgauge.benchmarks.ruler.tasks import TASKS
from kvgauge.prompts.benchmark_sample import PromptLength, Sample

__all__ = ["TASKS", "PromptLength", "RulerConfig", "Sample", "TaskSpec", "generate"]
