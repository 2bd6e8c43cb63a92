"""What a fit belongs to: a model, a method and the part of its configuration that decides what it learns."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from kvgauge.contract.fitted import Fitted
from kvgauge.contract.method import Method
from kvgauge.contract.roles import fitter_of
from kvgauge.errors import UserError
from kvgauge.models.identity import model_fingerprint

if TYPE_CHECKING:
    from kvgauge.calibration.moments import Moments


def learns(method: Method) -> bool:
    """Whether a method needs a fit."""
    return method.needs.learns is not None


def fit_config(method: Method) -> dict[str, Any]:
    """The part of a method's configuration that changes what its fit returns."""
    fitter = fitter_of(method)
    return {"method": type(fitter).__name__} | dict(fitter.needs.learns or {})


def fit_command(method: Method) -> str:
    """The command that fits a method: what it learns, and whether it does, may depend on its fields."""
    fitter = fitter_of(method)
    changed = {
        field.name: getattr(fitter, field.name)
        for field in fields(fitter)
        if field.name not in ("name", "budget") and getattr(fitter, field.name) != field.default
    }
    settings = (f"'method.{name}={json.dumps(value).replace(chr(34), '')}'" for name, value in changed.items())
    return " ".join([f"kvgauge fit method={fitter.name}", *settings])


def check_fitted(method: Method, model: PreTrainedModel, fitted: Fitted | None) -> Fitted:
    """`fitted`, if it is there and was made for this model by this kind of method.

    Raises:
        UserError: it is missing or belongs to something else.
    """
    if fitted is None:
        raise UserError(f"{method.name} needs fitted projections: run `{fit_command(method)}`")
    if fitted.metadata.get("model") != model_fingerprint(model):
        raise UserError(
            f"the projections were fitted for another model ({fitted.metadata.get('model_name', 'unknown')}): "
            f"run collect and fit with this one"
        )
    if fitted.metadata.get("fit_config") != fit_config(method):
        raise UserError(
            f"the projections were fitted with another configuration ({fitted.metadata.get('fit_config')}) "
            f"than {method.name} asks for ({fit_config(method)}): run fit again"
        )
    return fitted


def fit_metadata(method: Method, moments: Moments, model: PreTrainedModel, **learnt: Any) -> dict[str, Any]:
    """What a fit belongs to.

    Args:
        method: whose fit it is.
        moments: it was made of.
        model: they were collected on.
        learnt: what else there is to know.
    """
    return {
        "method": method.name,
        "fit_config": fit_config(method),
        "model": model_fingerprint(model),
        "model_name": moments.metadata.get("model_name", ""),
        "moments": moments.metadata,
    } | learnt
