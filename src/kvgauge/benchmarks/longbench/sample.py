"""From the official rows to prompts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from transformers import PreTrainedTokenizerBase

from kvgauge.benchmarks.longbench.buckets import bucket_of
from kvgauge.benchmarks.longbench.datasets import DATASETS, Dataset, Edition, file_name, task_name
from kvgauge.benchmarks.longbench.prompts import prompt_formats
from kvgauge.benchmarks.longbench.rows import ADVICE, Files, Row
from kvgauge.benchmarks.longbench.truncation import fit
from kvgauge.prompts.encoding import Template
from kvgauge.prompts.samples import Sample

if TYPE_CHECKING:
    from kvgauge.benchmarks.longbench.longbench import LongBench


def load(config: LongBench, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
    """The prompts of a configuration.

    Args:
        config: which of them.
        tokenizer: of the model; decides what is left of prompts that are longer than ``config.max_length``.

    Raises:
        UserError: a source that is missing, incomplete or damaged, an lm-eval without the official prompts, or a
            `max_length` too small for any text.
    """
    edition = cast(Edition, config.edition)
    files = Files(config.source, [file_name(name, edition) for name in config.tasks], ADVICE[edition])
    for name in config.tasks:
        dataset, task = DATASETS[name], task_name(name, edition)
        template = Template.of(tokenizer, config.chat and dataset.chat)
        rows = files.rows(file_name(name, edition))
        for index in _chosen(len(rows), config.samples, f"{config.seed}/{task}"):
            yield _sample(config, dataset, rows[index], f"{task}-{index:04d}", tokenizer, template)


def _chosen(size: int, count: int | None, seed: str) -> Sequence[int]:
    """Which rows: all, or the first `count` of an order that does not depend on `count`."""
    if count is None:
        return range(size)
    return random.Random(seed).sample(range(size), size)[:count]


def _sample(
    config: LongBench,
    dataset: Dataset,
    row: Row,
    sample_id: str,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
) -> Sample:
    """The sample of one row.

    Its task is the dataset, with ``_e`` in LongBench-E and ``_stand_in`` in the stand-in; its length what results are
    grouped by: in LongBench-E the bucket's number, see `Bucket.length`, else the configuration's `max_length` in
    tokens, 0 where it sets none. Its facts:

    - ``dataset``, and its ``category`` in the paper;
    - ``language``: the file's own: ``en``, ``zh``, or a programming language;
    - ``words``: the file's own length, see `Row.words`;
    - ``bucket``: LongBench-E's length interval; None in the other editions;
    - ``whole_tokens``: tokens before truncation, `max_new_tokens` included;
    - ``truncated``: whether the middle of the prompt was left out;
    - ``all_classes``: see `Row.all_classes`;
    - ``source_id``: the file's own ``_id``.
    """
    prompt = prompt_formats()[dataset.name]
    limit = None if config.max_length is None else config.max_length - dataset.max_new_tokens
    fitted = fit(tokenizer, template, prompt.context(row.context), prompt.question(row.input), limit)
    bucket = bucket_of(row.words) if config.edition == "e" else None
    return Sample(
        id=sample_id,
        task=task_name(dataset.name, cast(Edition, config.edition)),
        context=fitted.context,
        question=fitted.question,
        answers=row.answers,
        max_new_tokens=dataset.max_new_tokens,
        length=bucket.length if bucket else config.max_length or 0,
        tokens=fitted.tokens + dataset.max_new_tokens,
        chat=config.chat and dataset.chat,
        facts={
            "dataset": dataset.name,
            "category": dataset.category,
            "language": row.language,
            "words": row.words,
            "bucket": bucket.label if bucket else None,
            "whole_tokens": fitted.whole_tokens + dataset.max_new_tokens,
            "truncated": fitted.truncated,
            "all_classes": None if row.all_classes is None else list(row.all_classes),
            "source_id": row.source_id,
        },
    )
