"""A model's configuration with some of its fields replaced: context extension without editing files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvgauge.errors import UserError, unknown


def overridden(config: PreTrainedConfig, fields: Mapping[str, Any], name: str) -> PreTrainedConfig:
    """`config` made again with other values; of a model with several parts, that of its text model.

    A field of nested values (``rope_parameters``) is replaced as a whole.

    Args:
        config: of the model.
        fields: by name.
        name: of the model, for the error message.

    Raises:
        UserError: a field that the configuration does not have, or a value that it refuses.
    """
    text = config.get_text_config()
    known = text.to_dict()
    for key in fields:
        if key not in known:
            raise unknown(f"field of the configuration of model {name}", key, known)
    try:
        made = type(text).from_dict(known | dict(fields))
    except Exception as error:  # whatever its validation raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"model.config of {name} is refused ({type(error).__name__}: {reason}): correct it") from error
    rotary = getattr(made, "rope_parameters", None) or {}
    for parameters in (rotary, *(value for value in rotary.values() if isinstance(value, Mapping))):
        kind = parameters.get("rope_type", "default")
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            raise unknown(f"rope_type of model {name}", str(kind), ROPE_INIT_FUNCTIONS)
    if text is config:
        return made
    for part, value in vars(config).items():
        if value is text:
            setattr(config, part, made)
    return config
