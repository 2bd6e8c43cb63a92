"""demo: the whole pipeline on the embedded model, from prompts to the page.

    kvgauge demo
    kvgauge demo benchmark.samples=2 benchmark.tasks=[niah_single_1,qa_1]

Runs every stage once, one after the other, on ``conf/suite.yaml`` and the panel that it names, into ``artifacts/`` of
the current directory. What is finished already is not made again. Overrides go to every stage.
"""

from __future__ import annotations

import sys

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from kvgauge.cli.commands import run
from kvgauge.configuration import CONF_DIR
from kvgauge.errors import UserError
from kvgauge.evaluation.panel import settings
from kvgauge.stage import CommandParser, fail

STAGES = ("prepare", "collect", "fit", "merge", "evaluate", "latency", "report")
CONFIG, NAME = "suite", "suite"  # the configuration, and the directory of every stage


def main() -> None:
    """Run the stages; the last line on stdout is the page."""
    parser = CommandParser(__doc__)
    parser.add_argument("overrides", nargs="*", help="Hydra's, e.g. benchmark.samples=2")
    overrides = parser.parse_args().overrides
    _check_panel(overrides)
    for number, stage in enumerate(STAGES, start=1):
        print(f"{number}/{len(STAGES)} {stage}", file=sys.stderr)
        run(stage, ["--config-name", CONFIG, f"out={NAME}", *overrides])


def _check_panel(overrides: list[str]) -> None:
    """Refuse a panel that cannot be built, for want of a package, say, before the first stage does anything."""
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = compose(CONFIG, overrides=[f"out={NAME}", *overrides])
    except (HydraException, OmegaConfBaseException, ValueError, TypeError):
        return  # a mistake in the overrides: the first stage says which
    try:
        settings(cfg)
    except UserError as error:
        fail(str(error))
