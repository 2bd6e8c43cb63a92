"""From lm-eval's requests to samples: what is context, what is question, what ends an answer, what is scored."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from kvgauge.benchmarks.lm_eval_task.loading import is_generation
from kvgauge.benchmarks.lm_eval_task.splitting import beginning, split
from kvgauge.errors import UserError
from kvgauge.prompts.encoding import Template
from kvgauge.prompts.samples import Choice, Sample

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

    from kvgauge.benchmarks.lm_eval_task.lm_eval_task import LmEval

CONTEXT = "context"  # what a task file says in its metadata, and what a document calls its context


def samples_of(benchmark: LmEval, name: str, task: Task, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
    """The samples of a task, one for each document, in lm-eval's order.

    Raises:
        UserError: no documents, prompts without a context, or answers that the task wants sampled.
    """
    try:
        task.build_all_requests(
            limit=benchmark.samples,
            apply_chat_template=benchmark.chat,
            fewshot_as_multiturn=benchmark.chat,
            chat_template=chat_template(tokenizer) if benchmark.chat else None,
        )
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(f"lm-eval makes no prompts of task {name} ({error}): correct the task file") from error
    documents: dict[int, list[Instance]] = defaultdict(list)
    for instance in task.instances:
        documents[int(instance.doc_id or 0)].append(instance)
    for number, instances in documents.items():
        instances.sort(key=lambda instance: instance.idx)
        make = _generation if is_generation(task) else _likelihood
        yield make(benchmark, name, task, number, instances, tokenizer)


def document_hash(document: Mapping[str, Any]) -> str:
    """What tells whether a document is still the one that a prompt was made of."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()[:16]


def chat_template(tokenizer: PreTrainedTokenizerBase) -> Callable[..., str]:
    """The tokenizer's chat template as lm-eval's tasks call it: without system messages where it refuses them."""

    def render(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        def rendered(kept: Sequence[Mapping[str, str]]) -> str:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in kept],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return str(text)

        try:
            return rendered(messages)
        except TemplateError:
            return rendered([message for message in messages if message["role"] != "system"])

    return render


def _generation(
    benchmark: LmEval,
    name: str,
    task: Task,
    number: int,
    instances: Sequence[Instance],
    tokenizer: PreTrainedTokenizerBase,
) -> Sample:
    from lm_eval.models.utils import normalize_gen_kwargs

    text, options = instances[0].args[:2]
    wanted = dict(normalize_gen_kwargs(options))
    if wanted["do_sample"] and wanted.get("temperature", 1.0) > 0 and not benchmark.as_run:
        raise UserError(
            f"lm-eval task {name} wants its answers sampled (temperature {wanted.get('temperature', 1.0):g}): set "
            f"benchmark.as_run=true to have them decoded as the run says, greedily unless it has a temperature"
        )
    limit = benchmark.max_new_tokens or int(wanted["max_gen_toks"])
    prompt = _shortened(tokenizer, _without_bos(tokenizer, text), benchmark.max_length, limit)
    parts, how = _cut(benchmark, task, instances[0].doc, [prompt], [], tokenizer)
    return Sample(
        id=f"{name}-{number:05d}",
        task=name,
        context=parts.context,
        question=parts.question,
        answers=_references(task, instances[0].doc),
        max_new_tokens=limit,
        length=benchmark.max_length or 0,
        chat=False,  # lm-eval has rendered the template where it is wanted
        stop=tuple(stop for stop in wanted["until"] if stop),
        facts=_facts(number, instances[0].doc, how, prompt != _without_bos(tokenizer, text)),
    )


def _likelihood(
    benchmark: LmEval,
    name: str,
    task: Task,
    number: int,
    instances: Sequence[Instance],
    tokenizer: PreTrainedTokenizerBase,
) -> Sample:
    prompts, texts = [], []
    for instance in instances:
        text = _without_bos(tokenizer, instance.args[0])
        if not text.strip():
            raise UserError(
                f"lm-eval task {name} scores texts without a context before them (document {number}): there is "
                f"nothing to compress, take another task"
            )
        # blanks at the end of a prompt belong to the text behind it, as in lm-eval
        prompts.append(text.rstrip())
        texts.append(text[len(text.rstrip()) :] + instance.args[1])

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    shared = tokens(reduce(beginning, prompts))
    longest = max(tokens(prompt + text) for prompt, text in zip(prompts, texts, strict=True)) - shared
    whole = prompts
    if len(set(prompts)) == 1:
        prompts = [_shortened(tokenizer, prompts[0], benchmark.max_length, longest)] * len(prompts)
    parts, how = _cut(benchmark, task, instances[0].doc, prompts, texts, tokenizer)
    return Sample(
        id=f"{name}-{number:05d}",
        task=name,
        context=parts.context,
        question=parts.question,
        answers=_references(task, instances[0].doc),
        max_new_tokens=longest,
        length=benchmark.max_length or 0,
        chat=False,
        choices=tuple(Choice(text, rest) for text, rest in zip(texts, parts.rests, strict=True)),
        facts=_facts(number, instances[0].doc, how, prompts != whole),
    )


def _cut(
    benchmark: LmEval,
    task: Task,
    document: Mapping[str, Any],
    prompts: Sequence[str],
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Any, str]:
    """The parts of a document's prompts, and in words what told them apart."""
    end, how = _said_context(task, document, prompts[0])
    if end is None or any(prompt != prompts[0] for prompt in prompts):
        end, how = None, f"the last {benchmark.tail} tokens are the question"
    parts = split(tokenizer, prompts, texts, benchmark.tail, end)
    return parts, how if parts.exact else f"{how}, tokenised apart"


def _said_context(task: Task, document: Mapping[str, Any], prompt: str) -> tuple[int | None, str]:
    """Where the context ends that a task names: in ``metadata: {context: field or template}`` of its file, or as the
    field ``context`` of its documents, where that stands in the prompt and something follows it."""
    metadata = task.get_config("metadata") or {}
    said = metadata.get(CONTEXT) if isinstance(metadata, Mapping) else None
    if said is None and isinstance(document, Mapping) and isinstance(document.get(CONTEXT), str):
        said = CONTEXT
        how = "the context is the document's field context"
    else:
        how = "the context is what the task's metadata names"
    text = str(task.resolve_field(dict(document), said)).rstrip() if said else ""
    place = prompt.rfind(text) if text else -1
    end = place + len(text)
    return (end, how) if place >= 0 and end < len(prompt.rstrip()) else (None, "")


def _shortened(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None, room: int) -> str:
    """A prompt without its beginning, as far as it has to go: lm-eval truncates on the left.

    Raises:
        UserError: nothing is left.
    """
    if max_length is None:
        return text
    keep = max_length - room
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(spans) <= keep:
        return text
    if keep < 2:
        raise UserError(
            f"benchmark.max_length {max_length} leaves no room for a prompt before {room} tokens of answer: "
            f"set it higher"
        )
    return text[spans[-keep][0] :]


def _without_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A rendered prompt without the token that encoding puts in front of every prompt."""
    before = Template.of(tokenizer, False).before
    return text.removeprefix(before) if before else text


def _references(task: Task, document: Mapping[str, Any]) -> tuple[str, ...]:
    """What the document says is right, for people: a task scores by itself."""
    target = task.doc_to_target(dict(document))
    if isinstance(target, int) and task.get_config("doc_to_choice") is not None:
        choices = task.doc_to_choice(dict(document))
        return (str(choices[target]),) if 0 <= target < len(choices) else (str(target),)
    return tuple(map(str, target)) if isinstance(target, list | tuple) else (str(target),)


def _facts(number: int, document: Mapping[str, Any], how: str, truncated: bool) -> dict[str, Any]:
    return {
        "document": number,
        "document_hash": document_hash(document),
        "split": how,
        "truncated": truncated,
    }
