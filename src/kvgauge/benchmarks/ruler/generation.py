"""Samples of a task at a length: every one fits, and fills the length as far as the task can."""

from __future__ import annotations

from collections.abc import Iterator

from kvgauge.benchmarks.ruler.fitting import largest_fit
from kvgauge.benchmarks.ruler.spec import Draft, Draw, TaskSpec
from kvgauge.benchmarks.ruler.tasks import TASKS
from kvgauge.corpora.sources import Sources
from kvgauge.errors import UserError, unknown
from kvgauge.prompts.length import PromptLength
from kvgauge.prompts.samples import Sample

_TIDY_FILL = 0.95  # whole documents are worth this much of the length, a cut one is worth the rest
_SLACK = 1 / 256  # of the length: not worth another measurement


def generate(
    task: str, length: int, count: int, seed: int, prompt_length: PromptLength, sources: Sources
) -> Iterator[Sample]:
    """RULER samples of one task.

    A sample depends on the task, the length, the seed, its index, the tokenizer behind `prompt_length` and the sources,
    and on nothing else: asking for more samples adds to the end.

    Args:
        task: a name of `TASKS`.
        length: tokens of the assembled prompt and of the answer together, at most.
        count: number of samples.
        seed: any whole number.
        prompt_length: tokens of an assembled prompt.
        sources: the texts.

    Raises:
        UserError: an unknown task, `count` below one, a length the task does not fit in (the message names one that it
            does fit in), or more samples than a QA dataset has questions.
    """
    if task not in TASKS:
        raise unknown("RULER task", task, TASKS)
    if count < 1:
        raise UserError(f"RULER needs at least one sample per task, not {count}: set samples to 1 or more")
    return samples_of(TASKS[task], length, count, seed, prompt_length, sources)


def samples_of(
    spec: TaskSpec, length: int, count: int, seed: int, prompt_length: PromptLength, sources: Sources
) -> Iterator[Sample]:
    """As `generate`, of a task that need not be one of `TASKS`."""
    for index in range(count):
        draw = Draw(spec.name, length, index, seed, sources)
        chosen = _first_that_fits(spec, draw, prompt_length)
        if chosen is None:
            raise UserError(
                f"task {spec.name} does not fit in {length} tokens: "
                f"use a length of {_fitting_length(spec, length, count, seed, prompt_length, sources)} or more"
            )
        yield _sized(spec, draw, *chosen, prompt_length)


def _tokens(draft: Draft, size: int, prompt_length: PromptLength) -> int:
    return prompt_length(draft.context(size), draft.question, draft.answer_prefix)


def _first_that_fits(spec: TaskSpec, draw: Draw, prompt_length: PromptLength) -> tuple[Draft, int] | None:
    """The most faithful draft that fits at its smallest, and its tokens then."""
    for draft in spec.drafts(draw):
        tokens = _tokens(draft, draft.smallest, prompt_length)
        if tokens + spec.max_new_tokens <= draw.length:
            return draft, tokens
    return None


def _sized(spec: TaskSpec, draw: Draw, draft: Draft, smallest_tokens: int, prompt_length: PromptLength) -> Sample:
    size, tokens = largest_fit(
        lambda units: _tokens(draft, units, prompt_length),
        smallest=draft.smallest,
        smallest_tokens=smallest_tokens,
        largest=draft.largest,
        budget=draw.length - spec.max_new_tokens,
        slack=int(draw.length * _SLACK),
    )
    if (tidy := draft.whole(size)) != size:
        tidy_tokens = _tokens(draft, tidy, prompt_length)
        if tidy_tokens + spec.max_new_tokens >= _TIDY_FILL * draw.length:
            size, tokens = tidy, tidy_tokens
    return Sample(
        id=f"{spec.name}-{draw.length}-{draw.index:04d}",
        task=spec.name,
        context=draft.context(size),
        question=draft.question,
        answer_prefix=draft.answer_prefix,
        answers=draft.answers,
        max_new_tokens=spec.max_new_tokens,
        length=draw.length,
        tokens=tokens + spec.max_new_tokens,
    )


def _fitting_length(
    spec: TaskSpec, length: int, count: int, seed: int, prompt_length: PromptLength, sources: Sources
) -> int:
    """The least length above `length` at which all `count` samples fit.

    What is drawn, and with it what is needed, depends on the length a little, so the least tokens at one length are
    only a first guess: it climbs until all samples fit (the smallest prompts do not grow without bound), and is then
    bisected down.
    """

    def needed(at: int) -> int:
        draws = (Draw(spec.name, at, index, seed, sources) for index in range(count))
        least = (min(_tokens(draft, draft.smallest, prompt_length) for draft in spec.drafts(draw)) for draw in draws)
        return max(least) + spec.max_new_tokens

    fails, fits = length, needed(length)
    while (more := needed(fits)) > fits:
        fails, fits = fits, more
    while fits - fails > 1:
        middle = (fails + fits) // 2
        if needed(middle) <= middle:
            fits = middle
        else:
            fails = middle
    return fits
