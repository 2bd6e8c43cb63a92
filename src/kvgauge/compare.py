"""compare: two sets of results side by side.

    kvgauge compare artifacts/evaluate/before artifacts/evaluate/after
    kvgauge compare main HEAD --html comparison.html

A and B are evaluate directories, directories that hold some (an artifacts directory), or git revisions: ``REV`` or
``REV:path``, read from git and from DVC's cache without a checkout. Says which cells B has gained and lost, and for
cells in both the paired difference B minus A with its 95% interval on the samples that both have.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kvgauge.errors import UserError
from kvgauge.report.comparison import SideBySide, side_by_side
from kvgauge.report.comparison_page import comparison_page
from kvgauge.report.comparison_tables import aligned, chapters
from kvgauge.report.results import Results, read_results
from kvgauge.stage import CommandParser, fail


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Args:
        argv: its arguments; None: those of the process.
    """
    options = _parser().parse_args(argv)
    try:
        a, b = read_results(options.a), read_results(options.b)
        found = side_by_side(a.samples, b.samples, a.configs, b.configs)
        if options.html:
            _write(options.html, comparison_page(found, a.facts(), b.facts()))
    except UserError as error:
        fail(str(error))
    if options.json:
        print(json.dumps({"a": a.facts(), "b": b.facts(), **asdict(found)}))
    else:
        print(_text(found, a, b))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("Two sets of results side by side; differences are B minus A.", prog="kvgauge compare")
    kinds = "an evaluate directory, a directory that holds some, or a git revision (REV or REV:path)"
    parser.add_argument("a", metavar="A", help=kinds)
    parser.add_argument("b", metavar="B", help="likewise")
    parser.add_argument("--html", type=Path, metavar="PATH", help="also write a page that opens from disk")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def _text(found: SideBySide, a: Results, b: Results) -> str:
    sides = (("A", a), ("B", b))
    heads = [f"{side}: {one.where} ({one.cells} cells, {len(one.samples):,} samples)" for side, one in sides]
    paragraphs = ["\n".join(heads)]
    for part in chapters(found):
        paragraphs += [f"{part.title}. {part.text}", aligned(part.shown()), part.note]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _write(path: Path, page: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}: name another file with --html") from error


if __name__ == "__main__":
    main()
