"""Calibration corpora as token sequences of one length, calibration and validation text apart."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from kvgauge.corpora.sources import Sources, hub_rows
from kvgauge.errors import UserError, unknown

Split = Literal["calibration", "validation"]

KINDS = ("essays", "hub", "file")
# Parts of a text, as fractions of its characters. RULER fills its haystacks from the start of the same essays, so their
# first two fifths (about 280,000 tokens) are left to it: nothing is calibrated on the text it is evaluated on, except
# that a few essays quote earlier ones (0.3% of the calibration part).
_ESSAY_PARTS: dict[str, tuple[float, float]] = {"calibration": (0.4, 0.8), "validation": (0.8, 1.0)}
_FILE_PARTS: dict[str, tuple[float, float]] = {"calibration": (0.0, 0.8), "validation": (0.8, 1.0)}
_HUB_SPLITS: dict[str, str] = {"calibration": "train", "validation": "validation"}
_POOL = 4  # a hub corpus is read until it has this many times the tokens that are asked for, and sampled from those
_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class CorpusConfig:
    """What to calibrate on.

    Attributes:
        name: the corpus's name.
        kind: ``essays`` (Paul Graham's, from RULER's sources), ``hub`` (a dataset) or ``file`` (UTF-8 text).
        path: the file of kind ``file``.
        dataset: hub id, or local directory, of kind ``hub``.
        subset: the dataset's configuration; None for its default.
        text_column: the dataset's column that holds the text.
        sequence_length: tokens per sequence; the KQ-SVD paper (arXiv 2512.05916) uses 2,048.
        num_sequences: number of sequences.
        seed: which sequences are taken.
        source: where the essays come from, see `kvgauge.corpora.sources.Sources.find`.

    Raises:
        UserError: an unknown kind, or a length or number below one.
    """

    name: str = "essays"
    kind: str = "essays"
    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    text_column: str = "text"
    sequence_length: int = 2048
    num_sequences: int = 8
    seed: int = 0
    source: str = "wheel"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("corpus kind", str(self.kind), KINDS)
        for field in ("sequence_length", "num_sequences"):
            if getattr(self, field) < 1:
                raise UserError(f"corpus {self.name}: {field} is {getattr(self, field)}: set it to 1 or more")


def load_corpus(config: CorpusConfig, tokenizer: PreTrainedTokenizerBase, split: Split) -> torch.LongTensor:
    """Sequences of a corpus: random windows of its tokens that do not overlap, no padding, no special tokens.

    Calibration and validation are different parts of a text, or different splits of a dataset. A dataset's rows are
    joined by an empty line before they are cut into windows, as is usual for WikiText-2.

    Args:
        config: which corpus and how much of it.
        tokenizer: the model's tokenizer.
        split: ``calibration`` or ``validation``.

    Returns:
        Token ids, (num_sequences, sequence_length).

    Raises:
        UserError: the corpus has fewer tokens than asked for, or is not there (the message says what to do).
    """
    return _drawn(config, tokenizer, split)[0]


HELD_OUT = 2  # sequences: a loss measured on them is a mean over thousands of attention outputs


def load_held_out(config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> torch.LongTensor:
    """Up to `HELD_OUT` sequences of the calibration text that `load_corpus` does not draw.

    Returns:
        Token ids, (sequences, sequence_length); no sequence where calibration takes the whole text.

    Raises:
        UserError: as `load_corpus`.
    """
    return _drawn(config, tokenizer, "calibration")[1]


def _drawn(
    config: CorpusConfig, tokenizer: PreTrainedTokenizerBase, split: Split
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """The windows of a split that are drawn, and up to `HELD_OUT` of the others."""
    if split not in _HUB_SPLITS:
        raise unknown("corpus split", split, _HUB_SPLITS)
    needed = config.num_sequences * config.sequence_length
    tokens: list[int] = []
    for text in _texts(config, split):
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if config.kind == "hub" and len(tokens) >= _POOL * needed:
            break
    windows = len(tokens) // config.sequence_length
    if windows < config.num_sequences:
        raise UserError(
            f"corpus {config.name} ({split}) has {len(tokens)} tokens, {needed} are needed "
            f"({config.num_sequences} sequences of {config.sequence_length}): "
            "lower num_sequences or sequence_length, or use a larger corpus"
        )
    rows = torch.tensor(tokens[: windows * config.sequence_length], dtype=torch.long).view(windows, -1)
    chosen = random.Random(f"{config.seed}/{config.name}/{split}").sample(range(windows), config.num_sequences)
    others = sorted(set(range(windows)) - set(chosen))
    rest = random.Random(f"{config.seed}/{config.name}/held out").sample(others, min(HELD_OUT, len(others)))
    return torch.LongTensor(rows[chosen]), torch.LongTensor(rows[rest])


def _texts(config: CorpusConfig, split: Split) -> Iterator[str]:
    if config.kind == "essays":
        yield _part(Sources.find(config.source).essays, _ESSAY_PARTS[split])
    elif config.kind == "file":
        yield _part(_read(config), _FILE_PARTS[split])
    else:
        yield from _separated(_column(config, split))


def _part(text: str, fractions: tuple[float, float]) -> str:
    """The words of a text between two fractions of it; a word belongs to the part it starts in."""
    start, end = (_word_start(text, int(len(text) * fraction)) for fraction in fractions)
    return text[start:end]


def _word_start(text: str, position: int) -> int:
    while 0 < position < len(text) and not text[position - 1].isspace():
        position += 1
    return position


def _read(config: CorpusConfig) -> str:
    if config.path is None:
        raise UserError(f"corpus {config.name} needs a file: set corpus.path to a UTF-8 text file")
    try:
        return Path(config.path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"corpus {config.name}: cannot read {config.path} ({error.strerror}): set corpus.path"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"corpus {config.name}: {config.path} is not UTF-8 text: convert it first") from error


def _column(config: CorpusConfig, split: Split) -> Iterator[str]:
    if config.dataset is None:
        raise UserError(f"corpus {config.name} needs a dataset: set corpus.dataset to a hub id or a directory")
    # streaming: C4 has hundreds of gigabytes, and a calibration needs the first few shards' worth of rows
    for row in hub_rows(config.dataset, config.subset, _HUB_SPLITS[split], streaming=True):
        if config.text_column not in row:
            raise unknown(f"column of dataset {config.dataset}", config.text_column, row)
        yield str(row[config.text_column])


def _separated(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if text.strip():  # WikiText's rows are lines, many of them empty
            yield text.strip("\n") + _SEPARATOR
