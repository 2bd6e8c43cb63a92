"""lm-eval: any task of lm-eval on a compressed cache.

    kvgauge lm-eval --model kvgauge --model_args pretrained=smollm2-135m,method=kqsvd,budget=0.5 --tasks arc_easy

Its own command line with the model ``kvgauge`` registered.
"""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

from kvgauge.errors import UserError
from kvgauge.evaluation import lm_eval_model  # noqa: F401 - registers the model
from kvgauge.stage import fail

NOT_FOUND = "Tasks not found"  # lm-eval's words


def main() -> None:
    """The command; a task that lm-eval does not know is one line."""
    try:
        cli_evaluate()
    except UserError as error:
        fail(str(error))
    except ValueError as error:
        if not str(error).startswith(NOT_FOUND):
            raise
        fail(f"{str(error).lower()}: `lm-eval ls tasks` lists them")


if __name__ == "__main__":
    main()
