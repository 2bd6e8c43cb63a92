from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvgauge
from kvgauge.benchmarks.ruler import Ruler
from kvgauge.benchmarks.ruler.turns import needle_turns
from kvgauge.evaluation.answering import Answerer
from kvgauge.evaluation.cell import Cell
from kvgauge.evaluation.engine import Engine, missing, rows
from kvgauge.evaluation.store import AnswerStore
from kvgauge.evaluation.units import Encoder, Unit, make_units
from kvgauge.layers.cache import KVCache
from kvgauge.methods.exact.full import Full
from kvgauge.prompts.encoding import Template, encode, encode_follow_up
from kvgauge.prompts.samples import Sample

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]
CellMaker = Callable[..., Cell]
SampleMaker = Callable[..., list[Sample]]


class Seen:
    """Remembers what was computed."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, str]] = []

    def answered(self, cell: Cell, sample: Sample, text: str) -> None:
        self.answers.append((cell.label, sample.id))


def run(
    tiny: Tiny, cells: Sequence[Cell], units: Sequence[Unit], store: AnswerStore, encoder: Encoder | None = None
) -> Seen:
    seen = Seen()
    Engine(Answerer(*tiny), encoder or Encoder(*tiny, chat=None), cells, store, seen).run(units)
    return seen


def texts(store: AnswerStore, cells: Sequence[Cell], units: Sequence[Unit]) -> dict[str, str]:
    found = {}
    for cell in cells:
        for unit in units:
            for sample, key in zip(unit.samples, unit.keys, strict=True):
                record = store.get(cell.fingerprint, key)
                assert record is not None
                found[f"{cell.label}/{cell.compress_at}/{sample.id}"] = record["text"]
    return found


@pytest.fixture(scope="module")
def panel(make_cell: CellMaker) -> list[Cell]:
    return [
        make_cell("full"),
        make_cell("ksvd", budget=0.5),
        make_cell("kqsvd", budget=0.25, compress_at="prompt"),
        make_cell("kqsvd", budget=0.5),
        make_cell("full", compress_at="prompt"),
    ]


def test_a_panel_answers_as_its_cells_one_at_a_time(
    tiny: Tiny, panel: list[Cell], make_samples: SampleMaker, tmp_path: Path
) -> None:
    units = make_units(make_samples(3), Encoder(*tiny, chat=None))
    together, apart = AnswerStore(tmp_path / "together"), AnswerStore(tmp_path / "apart")
    seen = run(tiny, panel, units, together)
    assert len(seen.answers) == len(panel) * len(units)
    for cell in panel:
        run(tiny, [cell], units, apart)
    assert texts(together, panel, units) == texts(apart, panel, units)


@pytest.mark.parametrize("compress_at", ["context", "prompt"])
@pytest.mark.parametrize(("name", "budget"), [("full", None), ("ksvd", 0.5), ("kqsvd", 0.25)])
def test_the_engine_answers_as_generate(
    tiny: Tiny,
    make_cell: CellMaker,
    make_samples: SampleMaker,
    tmp_path: Path,
    name: str,
    budget: float | None,
    compress_at: str,
) -> None:
    cell = make_cell(name, compress_at, **({"budget": budget} if budget else {}))
    samples, store = make_samples(2), AnswerStore(tmp_path)
    units = make_units(samples, Encoder(*tiny, chat=None))
    run(tiny, [cell], units, store)
    for sample, text in zip(samples, texts(store, [cell], units).values(), strict=True):
        wanted = kvgauge.generate(
            *tiny,
            sample.context,
            sample.question,
            cell.method,
            fitted=cell.fitted,
            max_new_tokens=sample.max_new_tokens,
            compress_at=compress_at,
            answer_prefix=sample.answer_prefix,
        )
        assert text.strip() == wanted


def test_what_is_stored_is_not_computed_again(
    tiny: Tiny, panel: list[Cell], make_samples: SampleMaker, tmp_path: Path
) -> None:
    units, store = make_units(make_samples(3), Encoder(*tiny, chat=None)), AnswerStore(tmp_path)
    run(tiny, panel[:2], units, store)
    before = texts(store, panel[:2], units)
    assert run(tiny, panel[:2], units, store).answers == []
    assert missing(units[0], panel, store) == panel[2:]
    assert len(run(tiny, panel, units, store).answers) == 3 * 3
    assert texts(store, panel[:2], units) == before


def test_a_damaged_record_is_made_again(
    tiny: Tiny, panel: list[Cell], make_samples: SampleMaker, tmp_path: Path
) -> None:
    units, store = make_units(make_samples(3), Encoder(*tiny, chat=None)), AnswerStore(tmp_path)
    run(tiny, panel[:2], units, store)
    before = texts(store, panel[:2], units)
    path = store.path(panel[1].fingerprint, units[1].keys[0])
    path.write_text(path.read_text()[:-20])
    again = run(tiny, panel[:2], units, store)
    assert again.answers == [(panel[1].label, units[1].samples[0].id)]
    assert texts(store, panel[:2], units) == before


def test_two_runs_share_a_store(tiny: Tiny, panel: list[Cell], make_samples: SampleMaker, tmp_path: Path) -> None:
    units, store = make_units(make_samples(4), Encoder(*tiny, chat=None)), AnswerStore(tmp_path)
    first, second = run(tiny, panel[:2], units[::2], store), run(tiny, panel[:2], units[1::2], store)
    assert sorted(first.answers + second.answers) == sorted(
        run(tiny, panel[:2], units, AnswerStore(tmp_path / "b")).answers
    )
    assert run(tiny, panel[:2], units, store).answers == []


def test_batches_score_as_one_by_one(tiny: Tiny, panel: list[Cell], make_samples: SampleMaker, tmp_path: Path) -> None:
    samples, encoder = make_samples(5), Encoder(*tiny, chat=None)
    single = make_units(samples, encoder)
    run(tiny, panel, single, AnswerStore(tmp_path / "one"))
    wanted = texts(AnswerStore(tmp_path / "one"), panel, single)
    for size in (2, 5):
        units, store = make_units(samples, encoder, batch_size=size), AnswerStore(tmp_path / str(size))
        run(tiny, panel, units, store)
        assert texts(store, panel, units) == wanted


def test_what_knows_no_padding_is_answered_one_by_one(
    tiny: Tiny, make_cell: CellMaker, make_samples: SampleMaker, tmp_path: Path
) -> None:
    """A press beside others in a panel of batches, on prompts of different lengths."""
    cells = [make_cell("full"), make_cell("kvpress/snapkv", budget=0.5)]
    samples, encoder = make_samples(3), Encoder(*tiny, chat=None)
    together, apart = AnswerStore(tmp_path / "together"), AnswerStore(tmp_path / "apart")
    batched, single = make_units(samples, encoder, 3), make_units(samples, encoder)
    assert len(batched) == 1 and len(single) == 3
    assert len(run(tiny, cells, batched, together).answers) == 6
    run(tiny, cells, single, apart)
    assert texts(together, cells[1:], batched) == texts(apart, cells[1:], single)
    assert run(tiny, cells, batched, together).answers == []


def test_rows_hold_the_proof_of_compression(
    tiny: Tiny, panel: list[Cell], make_samples: SampleMaker, tmp_path: Path
) -> None:
    samples, store = make_samples(3), AnswerStore(tmp_path)
    units = make_units(samples, Encoder(*tiny, chat=None))
    run(tiny, panel, units, store)
    found = rows(units, samples, panel, store, "tiny/llama", Ruler())
    order = [(row["cell"], row["compress_at"], row["sample_id"]) for row in found.samples]
    assert order == [(cell.label, cell.compress_at, sample.id) for cell in panel for sample in samples]
    assert [(row["cell"], row["compress_at"], row["sample_id"]) for row in found.timings] == order
    lengths = {sample.id: len(sample.context) for sample in samples}  # a token is a byte
    for row in found.samples:
        assert row["compressed_tokens"] == row["context_tokens"] >= lengths[row["sample_id"]]
        assert (row["context_tokens"] == lengths[row["sample_id"]]) == (row["compress_at"] == "context")
        assert row["full_nbytes"] == kvgauge.full_nbytes(tiny[0], row["context_tokens"])
        assert row["nbytes"] == sum(row["nbytes_by_part"].values()) <= row["full_nbytes"] * (row["budget"] or 1.0)
        assert row["nbytes_end"] > row["nbytes"]
        assert row["kind"] == "retrieval"
        assert "seconds" not in row
    for row in found.timings:
        assert set(row["seconds"]) == {"prefill", "compress", "question", "decode"}
        assert min(row["seconds"].values()) >= 0.0
    json.dumps(found.samples)


class Lazy(Full):
    """Claims a budget and keeps everything."""

    def __post_init__(self) -> None:
        pass


class Forgetful(Full):
    """Never compresses."""

    def new_cache(self, *args: object, **kwargs: object) -> KVCache:
        cache = super().new_cache(*args, **kwargs)  # type: ignore[arg-type]
        cache.compress = lambda: None  # type: ignore[method-assign]
        return cache


@pytest.mark.parametrize(("method", "message"), [(Lazy(budget=0.5), "holds"), (Forgetful(), "compressed 0 of")])
def test_a_method_that_does_not_compress_is_found_out(
    tiny: Tiny, make_samples: SampleMaker, tmp_path: Path, method: Full, message: str
) -> None:
    units = make_units(make_samples(1), Encoder(*tiny, chat=None))
    with pytest.raises(RuntimeError, match=message):
        run(tiny, [Cell(method, "context", None, {})], units, AnswerStore(tmp_path))


def test_a_conversation_goes_on_in_one_cache(
    tiny: Tiny, make_cell: CellMaker, make_samples: SampleMaker, tmp_path: Path
) -> None:
    model, tokenizer = tiny
    [sample] = make_samples(1)
    turns = needle_turns(sample, 3)
    cells = [make_cell("full"), make_cell("ksvd", budget=0.5)]
    encoder, store = Encoder(*tiny, chat=None), AnswerStore(tmp_path)
    units = make_units(turns, encoder, turns=3)
    run(tiny, cells, units, store)
    answers = list(texts(store, cells[:1], units).values())

    # The uncompressed conversation again, as one text from its start at every turn.
    template = Template.of(tokenizer)
    first = encode(tokenizer, template, sample.context, sample.question, sample.answer_prefix)
    ids = torch.cat([first.context, first.question], dim=1)
    for number, (turn, text) in enumerate(zip(turns, answers, strict=True)):
        if number:
            follow_up = encode_follow_up(tokenizer, template, turn.question, turn.answer_prefix)
            ids = torch.cat([ids, follow_up], dim=1)
        longer = model.generate(
            ids, max_new_tokens=turn.max_new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert text == tokenizer.decode(longer[0, ids.shape[1] :], skip_special_tokens=True)
        ids = longer

    sizes = [store.get(cells[1].fingerprint, key) for key in units[0].keys]
    assert len({record["nbytes"] for record in sizes if record}) == 1  # one compression for all turns
    ends = [record["nbytes_end"] for record in sizes if record]
    assert ends == sorted(ends)


def test_later_turns_depend_on_the_moment_of_compression(
    tiny: Tiny, make_cell: CellMaker, make_samples: SampleMaker, tmp_path: Path
) -> None:
    turns = needle_turns(make_samples(1)[0], 2)
    cell = make_cell("ksvd", compress_at="prompt", budget=0.25)
    units, store = make_units(turns, Encoder(*tiny, chat=None), turns=2), AnswerStore(tmp_path)
    run(tiny, [cell], units, store)
    records = [store.get(cell.fingerprint, key) for key in units[0].keys]
    tokens = [record["context_tokens"] for record in records if record]
    prompt = f"{turns[0].context}{turns[0].question} {turns[0].answer_prefix}"  # a token is a byte
    assert tokens == [len(prompt)] * 2


def test_a_cut_context_is_counted(tiny: Tiny, make_cell: CellMaker, make_samples: SampleMaker, tmp_path: Path) -> None:
    [sample] = make_samples(1, max_new_tokens=2)
    long = replace(sample, context=sample.context * 50)
    encoder, store = Encoder(*tiny, chat=None, overlong="truncate"), AnswerStore(tmp_path)
    units, cell = make_units([long], encoder), make_cell("ksvd", budget=0.5)
    run(tiny, [cell], units, store, encoder)
    [row] = rows(units, [long], [cell], store, "tiny/llama", Ruler()).samples
    assert row["truncated"] is True
    assert row["context_tokens"] + row["truncated_tokens"] == len(long.context)


def test_a_missing_answer_is_never_left_out(
    tiny: Tiny, panel: list[Cell], make_samples: SampleMaker, tmp_path: Path
) -> None:
    samples = make_samples(1)
    units = make_units(samples, Encoder(*tiny, chat=None))
    with pytest.raises(RuntimeError, match="is not in"):
        rows(units, samples, panel, AnswerStore(tmp_path), "tiny/llama", Ruler())


def test_a_spread_model_answers_the_same(
    tiny: Tiny, panel: list[Cell], make_samples: SampleMaker, tmp_path: Path
) -> None:
    for part in tiny:
        part.save_pretrained(tmp_path / "model")
    spread = kvgauge.load_model(str(tmp_path / "model"), dtype="float32", device_map="auto")
    answers = []
    for name, pair in {"whole": tiny, "spread": spread}.items():
        units = make_units(make_samples(1), Encoder(*pair, chat=None))
        run(pair, panel, units, AnswerStore(tmp_path / name))
        answers.append(list(texts(AnswerStore(tmp_path / name), panel, units).values()))
    assert answers[0] == answers[1]
