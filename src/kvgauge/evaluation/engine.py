"""The evaluation engine: one prefill for every cell, one record for every answer.

For every unit of samples the context is prefilled once. Every cell whose prefill is exact adopts those keys and
values, compresses them and answers; streaming methods prefill by themselves. One context and one compressed cache are
in memory at a time. An answer is stored the moment it is there, and what is stored is never computed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from kvgauge.contract.benchmark import Benchmark
from kvgauge.evaluation.answering import Answer, Answerer, ExactPrefill
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.sampling import PROMPT, REPEAT
from kvgauge.evaluation.scoring import score
from kvgauge.evaluation.store import AnswerStore, Record
from kvgauge.evaluation.units import Encoder, Unit
from kvgauge.prompts.encoding import Batch
from kvgauge.prompts.samples import Sample

SHOWN_FACTS = ("depth", "split", PROMPT, REPEAT)  # facts of a sample that stand in its rows, where it has them


class Watcher(Protocol):
    """Sees the engine at work."""

    def answered(self, cell: Cell, sample: Sample, text: str) -> None:
        """A record was stored."""
        ...


def missing(unit: Unit, cells: Sequence[Cell], store: AnswerStore) -> list[Cell]:
    """The cells that lack a record of the unit."""
    return [cell for cell in cells if any(store.get(cell.fingerprint, key) is None for key in unit.keys)]


class Engine:
    """Answers units of samples with cells.

    Args:
        answerer: holds the model.
        encoder: makes token ids.
        cells: all cells of the run.
        store: takes the answers.
        watcher: is told of every answer.
    """

    def __init__(
        self, answerer: Answerer, encoder: Encoder, cells: Sequence[Cell], store: AnswerStore, watcher: Watcher
    ) -> None:
        self.answerer, self.encoder, self.store, self.watcher = answerer, encoder, store, watcher
        # The shared prefill grows from the context to the whole prompt, so the cells go in that order.
        self.cells = sorted(cells, key=lambda cell: (not cell.method.needs.exact_prefill, cell.compress_at == "prompt"))

    def run(self, units: Sequence[Unit]) -> None:
        """Answer what is not stored yet.

        Raises:
            UserError: a method refuses a prompt.
        """
        for unit in units:
            self._run(unit)

    def _run(self, unit: Unit) -> None:
        waiting = missing(unit, self.cells, self.store)
        if len(unit.samples) > 1 and not unit.conversation:
            alone = [cell for cell in waiting if self.answerer.alone(cell)]
            for single in unit.one_by_one() if alone else ():
                self._answer(single, missing(single, alone, self.store))
            waiting = [cell for cell in waiting if not self.answerer.alone(cell)]
        self._answer(unit, waiting)

    def _answer(self, unit: Unit, waiting: Sequence[Cell]) -> None:
        if not waiting:
            return
        batch, cut = self.encoder.batch(unit)
        drafts = self.answerer.drafts(batch)
        exact: ExactPrefill | None = None
        inputs = any(cell.method.needs.exact_prefill and cell.method.needs.sees_inputs for cell in waiting)
        for cell in waiting:
            if not missing(unit, [cell], self.store):
                continue  # another run has stored it meanwhile
            if cell.method.needs.exact_prefill:
                exact = self._exact(exact, cell, batch, inputs)
                answers = self.answerer.answer(cell, batch, exact, drafts)
            else:
                exact = None  # its memory is free before a streaming method prefills
                answers = self.answerer.answer(cell, batch, None, drafts)
            flat = answers[0] if unit.conversation else [turns[0] for turns in answers]
            for sample, key, answer, tokens_cut in zip(unit.samples, unit.keys, flat, cut, strict=True):
                record = dataclasses.asdict(answer) | {"truncated_tokens": tokens_cut}
                self.store.put(cell.fingerprint, key, record)
                self.watcher.answered(cell, sample, answer.text)

    def _exact(self, exact: ExactPrefill | None, cell: Cell, batch: Batch, inputs: bool) -> ExactPrefill:
        if exact is None:
            exact = self.answerer.exact_prefill(batch, inputs)
        if exact.upto != cell.compress_at:
            self.answerer.extend(exact, batch)
        return exact


@dataclasses.dataclass
class Rows:
    """Result rows of one run.

    Attributes:
        samples: one row per cell and sample, in the order of cells and samples.
        timings: ``{cell, sample_id, seconds}``, likewise; kept apart because no two runs take the same time.
    """

    samples: list[dict[str, Any]]
    timings: list[dict[str, Any]]


def rows(
    units: Sequence[Unit],
    samples: Sequence[Sample],
    cells: Sequence[Cell],
    store: AnswerStore,
    model_name: str,
    benchmark: Benchmark,
) -> Rows:
    """The rows of what is stored.

    Raises:
        RuntimeError: a record is missing.
        UserError: the benchmark cannot score an answer.
    """
    keys = {sample.id: key for unit in units for sample, key in zip(unit.samples, unit.keys, strict=True)}
    result = Rows([], [])
    for cell in cells:
        for sample in samples:
            record = store.get(cell.fingerprint, keys[sample.id])
            if record is None:
                raise RuntimeError(f"the answer of {cell.label} to {sample.id} is not in {store.root}")
            result.samples.append(_row(cell, sample, dict(record), model_name, benchmark))
            timing = {"cell": cell.label, "compress_at": cell.compress_at, "sample_id": sample.id}
            result.timings.append(timing | {"seconds": record["seconds"]})
    return result


def _row(cell: Cell, sample: Sample, record: Record, model_name: str, benchmark: Benchmark) -> dict[str, Any]:
    del record["seconds"]
    answer = record.pop("text")
    details = benchmark.details(sample, answer)
    return {
        "cell": cell.label,
        "method": cell.method.name,
        "budget": cell.budget,
        "combination": cell.method.combination,
        "compress_at": cell.compress_at,
        "model": model_name,
        "sample_id": sample.id,
        "task": sample.task,
        "kind": benchmark.kind(sample.task),
        "length": sample.length,
        "answer": answer,
        "answers": list(sample.answers),
        "score": score(benchmark, sample, answer),
        "truncated": bool(sample.facts.get("truncated")) or record["truncated_tokens"] > 0,
        **{name: sample.facts[name] for name in SHOWN_FACTS if name in sample.facts},
        **({"details": details} if details else {}),
        **record,
    }


__all__ = ["Answer", "Engine", "Rows", "missing", "rows"]
