"""methods: every method by family: what it stores, and what it asks of those who run it.

    kvgauge methods
    kvgauge methods --json
    kvgauge methods --config-dir my/conf

Needs: `fit` learns from calibration tokens (collect, then fit); `streams` compresses while it reads and prefills by
itself; `inputs` looks at what the attention modules are given; `16 bits` compares its bytes with a cache of 16 bits per
number; `alone` answers the prompts of a batch one by one; a package's name is one that has to be installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import groupby
from textwrap import wrap
from typing import Any

from kvgauge import configuration
from kvgauge.cli.listing import print_rows
from kvgauge.contract.method import Method
from kvgauge.errors import UserError
from kvgauge.fingerprint import module_file
from kvgauge.methods import registry

FAMILIES = "kvgauge.methods"
NOT_BUILT = "cannot be built"


def main() -> None:
    """Print the families, or one JSON list of methods."""
    print_rows(__doc__, lambda: sorted(rows(), key=lambda row: (row["family"], row["name"])), table)


def rows() -> Iterator[dict[str, Any]]:
    """Every method that has a name: its ``family``, ``about``, what it ``stores`` and ``needs``."""
    for name in sorted({*configuration.names("method"), *registry.registered()}):
        node = registry.node(name)
        try:
            built = registry.as_method(configuration.build(node, "method"))
        except UserError as error:
            yield {"name": name, "family": NOT_BUILT, "about": str(error), "stores": "", "needs": []}
            continue
        stores = _first_sentence(type(built).__doc__)
        yield {
            "name": name,
            "family": family(built),
            "about": configuration.about("method", name) or stores,
            "stores": stores,
            "needs": needs(built),
            "_target_": node["_target_"],
        }


def family(method: Method) -> str:
    """The folder of `kvgauge.methods` that a method stands in; for others their module."""
    module = type(method).__module__
    inside = module.removeprefix(f"{FAMILIES}.")
    return module if inside == module else inside.partition(".")[0]


def needs(method: Method) -> list[str]:
    """What a method asks of those who run it, in the words of the module's docstring."""
    asked = method.needs
    found = {
        "fit": asked.learns is not None,
        "streams": not asked.exact_prefill,
        "inputs": asked.sees_inputs,
        "16 bits": asked.reference_bits == 16,
        "alone": asked.alone,
    }
    return [*(word for word, true in found.items() if true), *asked.libraries]


def table(found: list[dict[str, Any]]) -> str:
    """The methods as text, family by family."""
    shown = [row for row in found if "/" not in row["name"]]
    width = max((len(row["name"]) for row in shown), default=0)
    wanted = max((len(", ".join(row["needs"])) for row in shown), default=0)
    lines: list[str] = []
    for name, members in groupby(found, key=lambda row: row["family"]):
        lines.append(f"{name}: {_family_about(name)}")
        folders: dict[str, list[str]] = {}
        for row in members:
            folder, _, last = row["name"].rpartition("/")
            if folder:
                folders.setdefault(folder, []).append(last)
            else:
                lines.append(f"  {row['name']:<{width}}  {', '.join(row['needs']):<{wanted}}  {row['about']}".rstrip())
        for folder, names in folders.items():  # dozens of a kind: their descriptions are those of their package
            lines += wrap(", ".join(names), 112, initial_indent=f"  {folder}/: ", subsequent_indent="    ")
        lines.append("")
    return "\n".join([*lines, "kvgauge methods --help says what the words between name and description mean."])


def _family_about(name: str) -> str:
    if name == NOT_BUILT:
        return "what stands in their way"
    module = f"{FAMILIES}.{name}"
    if module_file(module) is None:
        return "a package of its own"
    return _first_sentence(import_module(module).__doc__)


def _first_sentence(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
