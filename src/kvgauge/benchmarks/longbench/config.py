"""What to ask of LongBench: the configuration of ``conf/benchmark/longbench*.yaml``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvgauge.benchmarks.longbench.datasets import EDITIONS, names
from kvgauge.benchmarks.longbench.sample import LongBenchSample, load
from kvgauge.errors import UserError, unknown
from kvgauge.prompts.length import TokenCounter


@dataclass(frozen=True)
class LongBenchConfig:
    """Which prompts to make.

    Attributes:
        name: the benchmark's name; starts with ``longbench``.
        tasks: names of `kvgauge.benchmarks.longbench.DATASETS`, or ``"all"`` of the edition; a tuple of names
            afterwards.
        edition: ``standard`` (21 datasets), ``e`` (LongBench-E: 13 datasets of even lengths) or ``stand_in`` (4 of
            LongBench's kinds over other texts, see `kvgauge.benchmarks.longbench.stand_in`).
        samples: samples per dataset, drawn with `seed`; more of them add to those there are; None for all.
        source: ``hub``, a directory with the official JSON Lines files (or with their folder ``data``), or their
            ``data.zip``.
        max_length: tokens of the assembled prompt and its answer together, at most: the middle of a longer prompt is
            left out. None leaves prompts whole; evaluation then cuts those that exceed the model's positions.
        seed: of the draw.
        chat: use the tokenizer's chat template, except where the benchmark never does (few-shot learning and code).

    Raises:
        UserError: an unknown task or edition, or a number below one.
    """

    name: str = "longbench"
    tasks: str | Sequence[str] = "all"
    edition: str = "standard"
    samples: int | None = None
    source: str = "hub"
    max_length: int | None = None
    seed: int = 42
    chat: bool = True

    def __post_init__(self) -> None:
        if self.edition not in EDITIONS:
            raise unknown("LongBench edition", str(self.edition), EDITIONS)
        known = names(self.edition)
        chosen = (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)
        tasks = known if chosen == ("all",) else chosen
        for task in tasks:
            if task not in known:
                raise unknown(f"LongBench dataset (edition {self.edition})", str(task), [*known, "all"])
        object.__setattr__(self, "tasks", tasks)
        if not tasks:
            raise UserError("benchmark longbench needs at least one dataset: set tasks to all or to a list")
        for field in ("samples", "max_length"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(
                    f"benchmark longbench: {field} is {value}: set it to 1 or more, or to null for no limit"
                )

    def prompts(self, prompt_length: TokenCounter) -> Iterator[LongBenchSample]:
        """Every sample of every dataset, in the paper's order; arguments and errors as `load`."""
        return load(self, prompt_length.tokenizer)

    @property
    def total(self) -> int | None:
        """How many samples `prompts` yields: not known before the files are read."""
        return None
