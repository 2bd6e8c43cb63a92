"""What a model is given before it is measured: attention that caches take part in, and faster narrow products."""

from __future__ import annotations

from transformers import PreTrainedModel

from kvgauge.attend import attention
from kvgauge.models import mla, narrow_linear


def attach(model: PreTrainedModel) -> None:
    """Let caches attend by themselves; results with ordinary caches do not change, up to rounding."""
    attention.install(model)
    mla.install(model)
    narrow_linear.install(model)
