"""lm-eval's command line with the model ``kvgauge`` registered: ``python -m kvgauge.lm_eval --model kvgauge ...``."""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

from kvgauge.errors import UserError
from kvgauge.evaluation import lm_eval_model  # noqa: F401 - registers the model
from kvgauge.stage import fail


def main() -> None:
    try:
        cli_evaluate()
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
