"""The 13 tasks of RULER's official configuration, in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvgauge.benchmarks.ruler import common_words, frequent_words, niah, question_answering, variable_tracking
from kvgauge.benchmarks.ruler.common_words import CommonWords
from kvgauge.benchmarks.ruler.frequent_words import FrequentWords
from kvgauge.benchmarks.ruler.niah import Niah
from kvgauge.benchmarks.ruler.question_answering import QuestionAnswering
from kvgauge.benchmarks.ruler.spec import Category, Draft, Draw, Metric, TaskSpec
from kvgauge.benchmarks.ruler.variable_tracking import VariableTracking

_NIAH = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", value_type="uuids"),
    "niah_multikey_1": Niah("essay", keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", key_type="uuids", value_type="uuids"),
    "niah_multivalue": Niah("essay", values=4),
    "niah_multiquery": Niah("essay", keys=4, queries=4),
}


def _spec(
    name: str,
    category: Category,
    max_new_tokens: int,
    drafts: Callable[[Draw], Iterator[Draft]],
    metric: Metric = "string_match_all",
) -> TaskSpec:
    return TaskSpec(name, category, max_new_tokens, metric, drafts)


TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        *(_spec(name, "retrieval", niah.MAX_NEW_TOKENS, task.drafts) for name, task in _NIAH.items()),
        _spec("vt", "tracing", variable_tracking.MAX_NEW_TOKENS, VariableTracking(hops=4).drafts),
        _spec("cwe", "aggregation", common_words.MAX_NEW_TOKENS, CommonWords().drafts),
        _spec("fwe", "aggregation", frequent_words.MAX_NEW_TOKENS, FrequentWords(alpha=2.0).drafts),
        *(
            _spec(name, "qa", question_answering.MAX_NEW_TOKENS, task.drafts, "string_match_part")
            for name, task in {"qa_1": QuestionAnswering("squad"), "qa_2": QuestionAnswering("hotpotqa")}.items()
        ),
    )
}
