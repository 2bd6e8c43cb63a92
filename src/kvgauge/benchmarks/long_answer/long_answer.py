"""Long answers as a benchmark: what is compressed grows with what the model itself has written."""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvgauge.benchmarks.long_answer.tasks import TASKS, Task, numbered
from kvgauge.contract.benchmark import OTHER, Benchmark
from kvgauge.errors import UserError, unknown
from kvgauge.prompts.length import TokenCounter
from kvgauge.prompts.samples import Sample

APART = 100  # every text of a prompt has numbers of its own, from a hundred on: a number then says which line is meant
SPARE = 16  # tokens of an answer beyond the right one's, for blanks that a model puts elsewhere
_LINE = re.compile(r"^\s*(\d+)\.[ \t]*(.*?)\s*$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class LongAnswer(Benchmark):
    """Numbered answers, each line of which is right or wrong by itself, after a few short examples.

    The score is the share of the lines that are right; `details` has the share of lines before the first wrong one
    (``unbroken``) and whether all are right (``all``).

    Attributes:
        tasks: ``recite`` (a list again), ``transform`` (a word in front of each line), ``chain`` (sums that start from
            the result before), ``tally`` (how often each word came so far), or ``"all"``; a tuple of names afterwards.
        lengths: tokens of the answer, by which results are grouped: it has as many lines as fit.
        samples: per task and length.
        examples: answered ones in front of each prompt.
        example_lines: of each example.
        seed: what everything is drawn from.

    Raises:
        UserError: an unknown task, or a number out of range.
    """

    name: str = "long_answer"
    tasks: str | Sequence[str] = "all"
    lengths: Sequence[int] = (256, 1024)
    samples: int = 4
    examples: int = 2
    example_lines: int = 6
    seed: int = 42
    chat: bool = False

    def __post_init__(self) -> None:
        chosen = (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)
        tasks = tuple(TASKS) if chosen == ("all",) else chosen
        for task in tasks:
            if task not in TASKS:
                raise unknown("task of benchmark long_answer", str(task), [*TASKS, "all"])
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if not tasks or not self.lengths or min(self.lengths) < SPARE:
            raise UserError(
                f"benchmark long_answer: tasks {list(tasks)}, lengths {list(self.lengths)}: give at least one task, "
                f"and lengths of {SPARE} tokens or more"
            )
        for field, least in {"samples": 1, "examples": 0, "example_lines": 1}.items():
            if getattr(self, field) < least:
                raise UserError(f"benchmark long_answer: {field} is {getattr(self, field)}: set it to {least} or more")
        if self.example_lines > APART:
            raise UserError(f"benchmark long_answer: example_lines is {self.example_lines}: set it to {APART} or less")

    @property
    def total(self) -> int:
        """How many samples `prompts` yields."""
        return len(self.tasks) * len(self.lengths) * self.samples

    def prompts(self, counter: TokenCounter) -> Iterator[Sample]:
        """Every sample of every length and task, in that order."""
        for length in self.lengths:
            for task in self.tasks:
                for index in range(self.samples):
                    yield self._sample(counter, task, length, index)

    def _sample(self, counter: TokenCounter, name: str, length: int, index: int) -> Sample:
        task, seed = TASKS[name], f"{self.seed}/{name}/{length}/{index}"
        start = APART * (self.examples + 1) + 1

        def tokens(count: int) -> int:
            text = numbered(task.draw(random.Random(seed), count).answer, start)
            return len(counter.tokenizer(text, add_special_tokens=False).input_ids)

        # a line has a number, a point and something else, so that no answer has more lines than tokens
        count = max(bisect.bisect_right(range(1, length), length, key=tokens), 1)
        lines = task.draw(random.Random(seed), count)
        examples = ""
        for number in range(1, self.examples + 1):
            shown = task.draw(random.Random(f"{seed}/example/{number}"), self.example_lines)
            first = APART * number + 1
            examples += f"{_text(task, shown.text, first)}{numbered(shown.answer, first)}\n\n"
        whole = _text(task, lines.text, start)
        context, asked, _ = whole.rpartition(f"\n{task.asked}:\n")
        return Sample(
            id=f"{name}-{length}-{index:04d}",
            task=name,
            context=examples + context,
            question=f"{asked}{start}.",
            answers=lines.answer,
            max_new_tokens=tokens(count) + SPARE,
            length=length,
            chat=None if self.chat else False,
            stop=("\n\n",),
            facts={"start": start},
        )

    def score(self, sample: Sample, answer: str) -> float:
        """The share of the lines that are right: their text, but for case and blanks, behind their number."""
        right = _right(sample, answer)
        return sum(right) / len(right)

    def details(self, sample: Sample, answer: str) -> dict[str, float]:
        """The share of lines before the first wrong one, whether all are right, and how many lines there are."""
        right = _right(sample, answer)
        first = right.index(False) if False in right else len(right)
        return {"unbroken": first / len(right), "all": float(all(right)), "lines": float(len(right))}

    def kind(self, task: str) -> str:
        """Retrieval, reasoning or aggregation."""
        return TASKS[task].kind if task in TASKS else OTHER


def _text(task: Task, lines: Sequence[str], start: int) -> str:
    """A text up to its answer."""
    return f"{task.heading}:\n{numbered(lines, start)}\n{task.asked}:\n"


def _right(sample: Sample, answer: str) -> list[bool]:
    """For each line of the right answer whether the answer has it; of a number that comes twice the first counts."""
    said: dict[int, str] = {}
    start = int(sample.facts["start"])
    for number, text in _LINE.findall(f"{start}.{_ended(sample, answer)}"):
        said.setdefault(int(number), _plain(text))
    return [said.get(number) == _plain(line) for number, line in enumerate(sample.answers, start=start)]


def _ended(sample: Sample, answer: str) -> str:
    """An answer up to the text that ends it."""
    for stop in sample.stop:
        answer = answer.partition(stop)[0]
    return answer


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
