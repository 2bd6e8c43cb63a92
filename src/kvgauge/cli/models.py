"""models: every model of conf/model, where its weights come from, and in which dtype they are loaded.

    kvgauge models
    kvgauge models --json

``model=`` takes these names; `model.source` also takes a hub id, a directory or a ``.gguf`` file.
"""

from __future__ import annotations

import json
from pathlib import Path

from kvgauge import configuration
from kvgauge.errors import UserError
from kvgauge.stage import CommandParser, fail


def main() -> None:
    """Print the models, or one JSON list of them."""
    parser = CommandParser(__doc__)
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


def rows() -> list[dict[str, str]]:
    """Every model: its ``name``, ``source``, ``dtype``, and what it is ``about``."""
    found = []
    for name in configuration.names("model"):
        node = configuration.read("model", name)
        known = {"source": str(node.get("source", "")), "dtype": str(node.get("dtype", "float32"))}
        found.append({"name": name, **known, "about": configuration.about("model", name)})
    return found


def table(found: list[dict[str, str]]) -> str:
    """The models as text."""
    widths = {key: max((len(row[key]) for row in found), default=0) for key in ("name", "source", "dtype")}
    return "\n".join(
        "  ".join([*(f"{row[key]:<{width}}" for key, width in widths.items()), row["about"]]).rstrip() for row in found
    )
