"""lm-eval: any task of lm-eval on a compressed cache.

    kvgauge lm-eval --model kvgauge --model_args pretrained=smollm2-135m,method=kqsvd,budget=0.5 --tasks arc_easy

Its own command line with the model ``kvgauge`` registered.
"""

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
