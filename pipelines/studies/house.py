"""The house in one picture: every folder of the package, what it is for, and which folders it imports, from the code.

    python -m pipelines.studies.house docs/images/house.svg

A floor stands above all that it imports; an arc on the right is an import. What stands beneath everything (modules of
the package itself) is left out. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from kvgauge import fingerprint

PACKAGE = Path(fingerprint.__file__).parent
WIDTH = 11.5  # of a floor, in inches or so: the longest description fits


def floors() -> dict[str, set[str]]:
    """Every folder with the folders that it imports; each stands in front of all that it imports.

    Raises:
        RuntimeError: folders import each other in a circle.
    """
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if len(parts) == 1:
            continue
        module = ".".join(("kvgauge", *parts)).removesuffix(".__init__")
        below = {name.split(".")[1] for name in fingerprint.imports(module) if name.startswith("kvgauge.")}
        inside = {name for name in below if (PACKAGE / name).is_dir()}
        found.setdefault(parts[0], set()).update(inside - {parts[0]})
    ordered: dict[str, set[str]] = {}
    while found:
        top = [name for name in found if not any(name in below for below in found.values())]
        if not top:
            raise RuntimeError(f"imports in a circle: {', '.join(found)}")
        for name in sorted(top):
            ordered[name] = found.pop(name)
    return ordered


def describe(name: str) -> tuple[str, int]:
    """What a floor is for, by the first sentence of its docstring, and how many files it has."""
    files = sorted((PACKAGE / name).rglob("*.py"))
    text = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].rstrip("."), len([file for file in files if file.name != "__init__.py"])


def draw(house: dict[str, set[str]]) -> Figure:
    """The picture."""
    names = list(house)
    place = {name: -row for row, name in enumerate(names)}
    figure, axes = plt.subplots(figsize=(12, 0.46 * len(names)))
    for name in names:
        text, files = describe(name)
        row = place[name]
        axes.add_patch(Rectangle((0, row - 0.38), WIDTH, 0.76, facecolor="#eef2f7", edgecolor="#5b7083", linewidth=0.8))
        axes.text(0.1, row, name, va="center", fontsize=10, fontweight="bold", color="#1d2b36")
        axes.text(1.6, row, text, va="center", fontsize=8, color="#33424f")
        axes.text(WIDTH - 0.1, row, f"{files} files", va="center", ha="right", fontsize=8)
    for name, below in house.items():
        for other in below:
            span = place[name] - place[other]
            axes.add_patch(
                FancyArrowPatch(
                    (WIDTH, place[name]),
                    (WIDTH, place[other]),
                    connectionstyle=f"arc3,rad={-0.4 if span > 2 else -0.8}",
                    arrowstyle="-|>",
                    mutation_scale=7,
                    linewidth=0.6,
                    color=plt.get_cmap("tab20")(names.index(name) % 20),
                )
            )
    axes.set_xlim(-0.1, WIDTH + 0.22 * len(names))
    axes.set_ylim(-len(names) + 0.4, 0.6)
    axes.axis("off")
    figure.tight_layout(pad=0.2)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="where to draw it, .svg or .png")
    options = parser.parse_args()
    house = floors()
    plt.rcParams["svg.hashsalt"] = "kvgauge"  # the same code draws the same file
    draw(house).savefig(options.picture, metadata={"Date": None} if options.picture.suffix == ".svg" else None)
    print(
        json.dumps({"picture": str(options.picture), "floors": {name: sorted(below) for name, below in house.items()}})
    )


if __name__ == "__main__":
    main()
