"""What is run together: one sample, a batch of similar length, or a conversation over one context.

Which samples share a unit depends on the whole list of samples alone, never on what is stored already or on the
number of processes, so that an interrupted or a distributed run makes the same units again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgauge.architecture.facts import model_facts
from kvgauge.configuration import digest
from kvgauge.contract.benchmark import Overlong
from kvgauge.errors import UserError
from kvgauge.evaluation.sampling import REPEAT
from kvgauge.prompts.encoding import (
    Batch,
    EncodedChoice,
    Prompt,
    Template,
    batch_of,
    encode,
    encode_choices,
    encode_follow_up,
)
from kvgauge.prompts.samples import Sample


@dataclass(frozen=True)
class Unit:
    """Samples that share a prefill.

    Attributes:
        samples: the sequences of a batch, or the turns of a conversation.
        conversation: whether they are turns.
        keys: for each sample what its record is called: the hash of all that a cell sees of it.
    """

    samples: tuple[Sample, ...]
    conversation: bool
    keys: tuple[str, ...]

    def one_by_one(self) -> Iterator[Unit]:
        """The sequences of a batch as units of their own."""
        for sample, key in zip(self.samples, self.keys, strict=True):
            yield Unit((sample,), False, (key,))


class Encoder:
    """Token ids of units.

    Args:
        model: whose positions limit a prompt.
        tokenizer: of the model.
        chat: the benchmark's choice of a template, for samples that have none of their own.
        overlong: refuse prompts longer than the model's positions, or cut the middle out of their contexts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chat: bool | None,
        overlong: Overlong = "refuse",
    ) -> None:
        self.tokenizer, self.chat, self.overlong = tokenizer, chat, overlong
        self.positions = model_facts(model).max_positions
        self._template = lru_cache(maxsize=4)(lambda chat: Template.of(tokenizer, chat))

    def template(self, sample: Sample) -> Template:
        """The template of a sample."""
        return self._template(self.chat if sample.chat is None else sample.chat)

    def prompt(self, sample: Sample, room: int | None = None) -> tuple[Prompt, int]:
        """The prompt of a sample, and how many tokens were cut out of its context.

        Args:
            sample: which.
            room: tokens to keep free behind the prompt; None keeps those of its answer.

        Raises:
            UserError: the prompt is longer than the model's positions, and cutting is not allowed.
        """
        prompt = encode(self.tokenizer, self.template(sample), sample.context, sample.question, sample.answer_prefix)
        room = sample.max_new_tokens if room is None else room
        surplus = prompt.tokens + room - self.positions
        if surplus <= 0:
            return prompt, 0
        if self.overlong == "refuse" or surplus >= prompt.context.shape[1]:
            raise UserError(
                f"sample {sample.id} takes {prompt.tokens} tokens and {room} more for the answer, "
                f"more than the model's {self.positions} positions: prepare shorter prompts"
            )
        return prompt.without_middle(surplus), surplus

    def batch(self, unit: Unit) -> tuple[Batch, list[int]]:
        """The token ids of a unit, and for each sample how many tokens were cut out of its context."""
        if not unit.conversation:
            prompts, cut = zip(*(self.prompt(sample) for sample in unit.samples), strict=True)
            limits = [sample.max_new_tokens for sample in unit.samples]
            batch = batch_of(prompts, limits, self._pad())
            stop = [sample.stop for sample in unit.samples]
            names = [sample.id for sample in unit.samples]
            return replace(batch, stop=stop, choices=self._choices(unit.samples[0]), names=names), list(cut)
        first, *rest = unit.samples
        follow_ups = [
            encode_follow_up(self.tokenizer, self.template(sample), sample.question, sample.answer_prefix)
            for sample in rest
        ]
        answers = sum(sample.max_new_tokens for sample in unit.samples)
        prompt, cut_tokens = self.prompt(first, answers + sum(ids.shape[1] for ids in follow_ups))
        batch = batch_of([prompt], [first.max_new_tokens], self._pad())
        limits_by_turn = [[sample.max_new_tokens] for sample in unit.samples]
        batch = replace(batch, max_new_tokens=limits_by_turn, follow_ups=follow_ups, names=[first.id])
        return batch, [cut_tokens] * len(unit.samples)

    def _choices(self, sample: Sample) -> list[EncodedChoice]:
        if not sample.choices:
            return []
        template = self.template(sample)
        return encode_choices(self.tokenizer, template, sample.question, sample.answer_prefix, sample.choices)

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)


def make_units(samples: Sequence[Sample], encoder: Encoder, batch_size: int = 1, turns: int = 1) -> list[Unit]:
    """The units of samples.

    Args:
        samples: all of them.
        encoder: measures and checks them.
        batch_size: contexts that are run at once.
        turns: so many samples with the same context are the turns of one conversation, in their order.

    Raises:
        UserError: fewer than one turn or sequence of a batch, a sample that does not fit in the model's positions,
            batches of conversations, or ``turns`` where no two samples share a context.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: set it to 1 or more")
    if turns < 1:
        raise UserError(f"turns is {turns}: set it to 1 or more")
    if turns > 1:
        if batch_size > 1:
            raise UserError("turns and batch_size above 1 do not go together: set batch_size=1")
        if any(sample.choices or sample.stop for sample in samples):
            raise UserError("turns are questions that are answered at length, and these are not: set turns=1")
        return _conversations(samples, encoder, turns)
    measured = [encoder.prompt(sample) for sample in samples]
    alone = [sample_key(sample, encoder, cut=cut) for sample, (_, cut) in zip(samples, measured, strict=True)]
    single = [Unit((sample,), False, (key,)) for sample, key in zip(samples, alone, strict=True)]
    if batch_size == 1:
        return single
    sizes = [(prompt.context.shape[1], prompt.question.shape[1]) for prompt, _ in measured]
    classes = _size_classes([context for context, _ in sizes])
    # A batch decodes until its longest answer ends, and how long answers are is a matter of the task: of contexts that
    # are about as long, those of a task go together. Long contexts first: what does not fit in memory fails at once,
    # and the last units to end are the short ones.
    order = sorted(
        (index for index in range(len(samples)) if not samples[index].choices),
        key=lambda index: (classes[index], samples[index].task, [-size for size in sizes[index]], samples[index].id),
    )
    units = [unit for unit in single if unit.samples[0].choices]  # choices are a batch of their own
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        together = tuple(samples[index] for index in chosen)
        # Methods that size or rank by the whole batch answer one row differently beside other rows.
        batch = [alone[index] for index in chosen] if len(chosen) > 1 else []
        keys = tuple(sample_key(samples[index], encoder, batch=batch, cut=measured[index][1]) for index in chosen)
        units.append(Unit(together, False, keys))
    return units


def _size_classes(sizes: Sequence[int]) -> list[int]:
    """For each size its class, 0 for the largest: the smallest of a class is at most a fifth below its largest."""
    classes: dict[int, int] = {}
    largest = None
    for size in sorted(set(sizes), reverse=True):
        if largest is None or size < 0.8 * largest:
            largest = size
        classes[size] = largest
    ranks = {largest: rank for rank, largest in enumerate(sorted(set(classes.values()), reverse=True))}
    return [ranks[classes[size]] for size in sizes]


def _conversations(samples: Sequence[Sample], encoder: Encoder, turns: int) -> list[Unit]:
    groups: dict[tuple[str, bool | None], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.context, sample.chat), []).append(sample)
    if all(len(group) == 1 for group in groups.values()):
        raise UserError("turns needs samples that share a context, and there are none: set turns=1")
    talks = [tuple(group[start : start + turns]) for group in groups.values() for start in range(0, len(group), turns)]
    units = []
    for talk in talks:
        unit = Unit(talk, True, ())
        _, cut = encoder.batch(unit)
        asked: list[list[object]] = []
        keys = []
        for sample in talk:
            keys.append(sample_key(sample, encoder, asked=list(asked), cut=cut[0]))
            asked.append([sample.question, sample.answer_prefix, sample.max_new_tokens])
        units.append(replace(unit, keys=tuple(keys)))
    return units


def _answered(sample: Sample) -> dict[str, object]:
    """What ends an answer or stands in its place, and which of several it is."""
    return {
        "stop": list(sample.stop),
        "choices": [[choice.text, choice.rest] for choice in sample.choices],
        "repeat": sample.facts.get(REPEAT),
    }


def sample_key(sample: Sample, encoder: Encoder, **more: object) -> str:
    """The name of a sample's record: its id, and a hash of all that a cell sees of it.

    Args:
        sample: which.
        encoder: whose template and positions it meets.
        more: what else a cell sees, e.g. the questions asked before.
    """
    template = encoder.template(sample)
    seen = {
        "context": sample.context,
        "question": sample.question,
        "answer_prefix": sample.answer_prefix,
        "max_new_tokens": sample.max_new_tokens,
        "template": [template.before, template.after, template.between],
        **{key: value for key, value in (more | _answered(sample)).items() if value},
    }
    name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in sample.id)[:80]
    return f"{name}-{digest(seen)}"
