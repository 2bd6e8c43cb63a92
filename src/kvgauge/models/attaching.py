"""What a model is given before it is measured: caches that attend, prompts that leave nothing behind."""

from __future__ import annotations

from transformers import PreTrainedModel

from kvgauge.architecture import prompt_length
from kvgauge.attend import attention
from kvgauge.models import mla, narrow_linear
from kvgauge.models.devices import check_whole


def attach(model: PreTrainedModel) -> None:
    """Let caches attend by themselves; results with ordinary caches do not change, up to rounding.

    Raises:
        UserError: the model is tensor-parallel.
    """
    check_whole(model)
    attention.install(model)
    mla.install(model)
    narrow_linear.install(model)
    prompt_length.install(model)
