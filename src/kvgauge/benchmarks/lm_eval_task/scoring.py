"""Scores by lm-eval's own filters and `process_results`."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

from kvgauge.benchmarks.lm_eval_task.loading import is_generation
from kvgauge.benchmarks.lm_eval_task.prompts import document_hash
from kvgauge.errors import UserError
from kvgauge.prompts.choices import of_text
from kvgauge.prompts.samples import Sample

if TYPE_CHECKING:
    from lm_eval.api.task import Task


class Scorer:
    """Scores answers to the documents of one task.

    Args:
        task: loaded.
        metric: what the score is; None takes the first that runs from 0 to 1 and is averaged over documents.
        filter: whose answer is scored; None takes the task's first.
    """

    def __init__(self, task: Task, metric: str | None = None, filter: str | None = None) -> None:
        self.task, self.metric, self.filter = task, metric, filter
        self.documents = task.eval_docs

    def figures(self, sample: Sample, answer: str) -> dict[str, float]:
        """Every number that lm-eval makes of an answer, by ``metric,filter`` as in its results.

        Raises:
            UserError: the document is another one than when the prompt was made.
        """
        return {
            f"{metric},{name}": float(value)
            for (metric, name), value in self._results(sample, answer).items()
            if isinstance(value, Real)
        }

    def score(self, sample: Sample, answer: str) -> float:
        """The figure that is the score.

        Raises:
            UserError: there is no such metric or filter, or it is no mean of figures from 0 to 1.
        """
        results = self._results(sample, answer)
        filters = list(dict.fromkeys(name for _, name in results))
        chosen = self.filter or filters[0]
        if chosen not in filters:
            raise UserError(
                f"lm-eval task {sample.task} has no filter {chosen!r}: set benchmark.filter to one of "
                f"{', '.join(filters)}"
            )
        metrics = {metric: value for (metric, name), value in results.items() if name == chosen}
        usable = [metric for metric, value in metrics.items() if self._is_share(metric, value)]
        wanted = self.metric or (usable[0] if usable else None)
        if wanted is None or wanted not in usable:
            said = f"has no metric {wanted!r}" if wanted else "has no metric"
            raise UserError(
                f"lm-eval task {sample.task} {said} that runs from 0 to 1 and is averaged over documents: "
                + (f"set benchmark.metric to one of {', '.join(usable)}" if usable else "take another task")
            )
        return float(metrics[wanted])

    def _is_share(self, metric: str, value: Any) -> bool:
        from lm_eval.api.metrics import mean

        averaged = self.task.aggregation().get(metric, mean) is mean
        return averaged and isinstance(value, Real) and 0.0 <= float(value) <= 1.0

    def _results(self, sample: Sample, answer: str) -> Mapping[tuple[str, str], Any]:
        from lm_eval.api.instance import Instance
        from lm_eval.models.utils import postprocess_generated_text

        document = self._document(sample)
        if is_generation(self.task):
            responses: list[Any] = [postprocess_generated_text(answer, list(sample.stop), None)]
        else:
            responses = of_text(answer)
        kind = "generate_until" if is_generation(self.task) else "loglikelihood"
        number = int(sample.facts["document"])
        instances = [
            Instance(kind, document, ("", ""), index, (sample.task, number, 1), [response])
            for index, response in enumerate(responses)
        ]
        for ensemble in self.task._filters:
            ensemble.apply(instances)
        return {
            (metric, name): value
            for name in instances[0].filtered_resps
            for metric, value in self.task.process_results(
                document, [instance.filtered_resps[name] for instance in instances]
            ).items()
        }

    def _document(self, sample: Sample) -> dict[str, Any]:
        number = int(sample.facts["document"])
        document = dict(self.documents[number]) if number < len(self.documents) else {}
        if document_hash(document) != sample.facts["document_hash"]:
            raise UserError(
                f"document {number} of lm-eval task {sample.task} is not the one that its prompt was made of: remove "
                f"the prompts and run `kvgauge prepare` again"
            )
        return document
