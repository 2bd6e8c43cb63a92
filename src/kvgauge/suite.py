"""`params.yaml`: the composed configuration that DVC's stages read and watch.

    python -m kvgauge.suite

writes it from `conf/suite.yaml`, with the function that ``dvc exp run`` itself composes with, so that both agree to the
byte.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dvc.utils.hydra import compose_and_dump

from kvgauge.artifacts import replacing
from kvgauge.configuration import CONF_DIR

PARAMS = "params.yaml"


def write_params(path: Path) -> None:
    """Compose ``conf/suite.yaml`` into `path`."""
    with replacing(path) as scratch:
        target = scratch.with_suffix(".yaml")
        compose_and_dump(str(target), str(CONF_DIR), None, "suite", str(CONF_DIR), [])
        text = target.read_bytes()
        target.unlink()
        scratch.write_bytes(text)


if __name__ == "__main__":
    write_params(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(PARAMS))
