"""RULER (Hsieh et al., arXiv 2404.06654): its 13 tasks at any length and any number of samples, seeded."""

from kvgauge.benchmarks.ruler.generation import generate
from kvgauge.benchmarks.ruler.ruler import Ruler
from kvgauge.benchmarks.ruler.spec import TaskSpec
from kvgauge.benchmarks.ruler.tasks import TASKS

__all__ = ["TASKS", "Ruler", "TaskSpec", "generate"]
