"""The picture of the needle's chapter by itself: scores by depth and length, a panel per cell, and the table behind it.

    python -m pipelines.studies.needle_map artifacts/evaluate/needle docs/images/needle.png

Reads one or more directories of the evaluate stage whose samples have a depth, all of one model and one moment of
compression; writes the picture, and prints the mean score of every cell as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from kvgauge.artifacts import replacing
from kvgauge.errors import UserError
from kvgauge.report import plots
from kvgauge.report.collect import collect
from kvgauge.report.needle import needle_table
from kvgauge.stage import fail


def draw(directories: Sequence[Path], picture: Path) -> dict[str, float]:
    """Draw the map of some evaluations.

    Returns:
        The mean score of every cell.

    Raises:
        UserError: no sample has a depth, or there are several models or moments of compression.
    """
    table = needle_table(collect(directories).samples)
    if table.empty:
        raise UserError(f"no sample in {', '.join(map(str, directories))} has a depth: evaluate benchmark=needle")
    settings = table[["model", "compress_at"]].drop_duplicates()
    if len(settings) > 1:
        raise UserError(
            f"the samples are of {len(settings)} models or moments of compression: give directories of one of them"
        )
    with replacing(picture) as scratch:
        scratch.write_bytes(plots.to_png(plots.needle(table)))
    weighted = (table["score"] * table["n"]).groupby(table["cell"], sort=False).sum()
    means = weighted / table["n"].groupby(table["cell"], sort=False).sum()
    return {str(cell): round(float(mean), 4) for cell, mean in means.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+", help="of the evaluate stage")
    parser.add_argument("picture", type=Path, help="a .png file")
    options = parser.parse_args(arguments)
    try:
        print(json.dumps(draw(options.directories, options.picture)))
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
