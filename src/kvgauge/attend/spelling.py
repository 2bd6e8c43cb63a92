"""Which masks transformers spells out for models that attend through kvgauge: none that is plainly causal.

transformers leaves a causal mask out where torch's flag for it will do, aligned at the first token: in a prompt's first
chunk, or for a single query. Attention here aligns it at the last token, and needs no mask of a later chunk either:
kernels that take none stay possible, and there is no tensor of all queries and tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask


def spelt_out(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """A mask (batch, 1, queries, tokens), True where a query sees a token; None where it is causal to the last token.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, local_size, kwargs: as in transformers'
            `sdpa_mask`.
        allow_is_causal_skip: the mask is causal but for padding and `local_size`.
    """
    inside = local_size is None or kv_length < local_size
    if allow_is_causal_skip and inside and not isinstance(q_offset, Tensor):
        to_the_last = q_offset + q_length == kv_offset + kv_length
        if to_the_last and (attention_mask is None or not torch.compiler.is_compiling()):
            if attention_mask is None or (attention_mask.shape[-1] == kv_length and bool(attention_mask.all())):
                return None
            allow_is_causal_skip = False  # it has just been looked at
        else:
            allow_is_causal_skip = q_length in (1, kv_length)
    elif isinstance(q_offset, Tensor):
        allow_is_causal_skip = False  # reading it would wait for the device
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )
    return mask
