"""Commands that list something: a table for people, one JSON list for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from kvgauge import configuration
from kvgauge.errors import UserError
from kvgauge.stage import CommandParser, fail

Rows = TypeVar("Rows")


def print_rows(description: str | None, rows: Callable[[], Rows], table: Callable[[Rows], str]) -> None:
    """Read the command line and print the rows.

    Args:
        description: of the command.
        rows: makes them, when the user's own configurations are known.
        table: shows them as text.
    """
    parser = CommandParser(description)
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument("--config-dir", type=Path, help="a directory of your own, laid out like conf/")
    options = parser.parse_args()
    if options.config_dir is not None:
        configuration.add_directory(options.config_dir)
    try:
        found = rows()
    except UserError as error:
        fail(str(error))
    print(json.dumps(found, ensure_ascii=False) if options.json else table(found))
