"""models: every model of conf/model, where its weights come from, and in which dtype they are loaded.

    kvgauge models
    kvgauge models --json

``model=`` takes these names; `model.source` also takes a hub id, a directory or a ``.gguf`` file.
"""

from __future__ import annotations

from kvgauge import configuration
from kvgauge.cli.listing import print_rows


def main() -> None:
    """Print the models, or one JSON list of them."""
    print_rows(__doc__, rows, table)


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
