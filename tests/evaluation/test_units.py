from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgauge.benchmarks.ruler.turns import needle_turns
from kvgauge.errors import UserError
from kvgauge.evaluation.units import Encoder, make_units
from kvgauge.prompts.samples import Choice, Sample

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]
SampleMaker = Callable[..., list[Sample]]


@pytest.fixture
def encoder(tiny: Tiny) -> Encoder:
    return Encoder(*tiny, chat=None)


def test_one_unit_per_sample_in_their_order(encoder: Encoder, make_samples: SampleMaker) -> None:
    samples = make_samples(3)
    units = make_units(samples, encoder)
    assert [unit.samples for unit in units] == [(sample,) for sample in samples]
    assert len({key for unit in units for key in unit.keys}) == 3


def test_a_key_depends_on_what_a_cell_sees_and_on_nothing_else(encoder: Encoder, make_samples: SampleMaker) -> None:
    [sample] = make_samples(1)

    def key(changed: Sample) -> str:
        return make_units([changed], encoder)[0].keys[0]

    assert key(replace(sample, answers=("other",), length=512, task="vt", facts={"a": 1})) == key(sample)
    for changed in (
        replace(sample, context=sample.context + "x"),
        replace(sample, question="Which?"),
        replace(sample, answer_prefix=""),
        replace(sample, max_new_tokens=7),
        replace(sample, stop=("\n",)),
        replace(sample, choices=(Choice("blue"),)),
    ):
        assert key(changed) != key(sample)


def test_batches_hold_similar_lengths_and_every_sample_once(encoder: Encoder, make_samples: SampleMaker) -> None:
    samples = make_samples(5)
    units = make_units(samples, encoder, batch_size=2)
    assert [len(unit.samples) for unit in units] == [2, 2, 1]
    assert sorted(sample.id for unit in units for sample in unit.samples) == [sample.id for sample in samples]
    widths = [len(sample.context) for unit in units for sample in unit.samples]
    assert widths == sorted(widths, reverse=True)
    shuffled = make_units([samples[index] for index in (3, 0, 4, 1, 2)], encoder, batch_size=2)
    assert [unit.keys for unit in shuffled] == [unit.keys for unit in units]


def test_a_key_depends_on_what_shares_the_batch(encoder: Encoder, make_samples: SampleMaker) -> None:
    first, second, third = make_samples(3)
    other = replace(second, context=second.context.replace("a", "o"))  # the same id, another text

    def key(*batch: Sample) -> str:
        [unit] = make_units(batch, encoder, batch_size=3)
        return dict(zip((sample.id for sample in unit.samples), unit.keys, strict=True))[first.id]

    assert key(first) == make_units([first], encoder)[0].keys[0]
    keys = [key(first), key(first, second), key(first, other), key(first, third), key(first, second, third)]
    assert len(set(keys)) == len(keys)
    assert key(second, first) == key(first, second)


def test_fewer_than_one_turn_is_refused(encoder: Encoder, make_samples: SampleMaker) -> None:
    with pytest.raises(UserError, match="turns is 0: set it to 1 or more"):
        make_units(make_samples(1), encoder, turns=0)


def test_turns_are_grouped_by_context(encoder: Encoder, make_samples: SampleMaker) -> None:
    talks = [needle_turns(sample, 3) for sample in make_samples(2)]
    units = make_units([turn for talk in talks for turn in talk], encoder, turns=3)
    assert [list(unit.samples) for unit in units] == talks
    assert all(unit.conversation for unit in units)
    # The first question meets the same cache as without further turns; the later ones have a past.
    assert units[0].keys[0] == make_units(talks[0][:1], encoder)[0].keys[0]
    assert units[0].keys[1] != make_units(talks[0][1:2], encoder)[0].keys[0]
    batch, _ = encoder.batch(units[0])
    assert len(batch.follow_ups) == 2 and len(batch.max_new_tokens) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "1 or more"),
        ({"batch_size": 2, "turns": 2}, "do not go together"),
        ({"turns": 2}, "share a context"),
    ],
)
def test_bad_options_are_refused(
    encoder: Encoder, make_samples: SampleMaker, options: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_units(make_samples(2), encoder, **options)


def test_a_sample_beyond_the_positions_is_refused_or_cut(tiny: Tiny, make_samples: SampleMaker) -> None:
    [sample] = make_samples(1)
    long = replace(sample, context=sample.context * 60)
    with pytest.raises(UserError, match="8192 positions"):
        make_units([long], Encoder(*tiny, chat=None))
    cutting = Encoder(*tiny, chat=None, overlong="truncate")
    prompt, cut = cutting.prompt(long)
    assert cut > 0 and prompt.tokens + long.max_new_tokens == 8192
    whole = Encoder(*tiny, chat=None).tokenizer(long.context).input_ids
    kept = prompt.context.shape[1]
    assert prompt.context[0].tolist() == whole[: kept // 2] + whole[-(kept - kept // 2) :]
    [unit] = make_units([long], cutting)
    batch, [same] = cutting.batch(unit)
    assert same == cut and batch.width("prompt") == prompt.tokens


def test_a_question_beyond_the_positions_cannot_be_cut(tiny: Tiny, make_samples: SampleMaker) -> None:
    [sample] = make_samples(1)
    with pytest.raises(UserError, match="8192 positions"):
        Encoder(*tiny, chat=None, overlong="truncate").prompt(replace(sample, question="why? " * 2000))
