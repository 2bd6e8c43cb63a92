"""How many queries attend at once: scores of many queries and a long cache are made block by block."""

from __future__ import annotations

import torch

SCORE_BLOCK_BYTES = 8 * 2**20
"""Scores of one block of queries on a CPU. A few such blocks live at a time, and they stay in the last-level cache."""

SHARE = 64
"""On a device a block may take this part of the memory: three or four tensors of that size live at a time."""

LEAST_QUERIES = 16
"""Of a block, whatever its scores take: each block reads the whole cache once, and some rebuild their keys for it."""

MASK_BYTES = 32 * 2**20
"""A mask of numbers for one block of queries on a CPU."""


def score_block_bytes(device: torch.device) -> int:
    """Bytes that the scores of one block of queries may take."""
    if device.type != "cuda":
        return SCORE_BLOCK_BYTES
    return max(SCORE_BLOCK_BYTES, torch.cuda.get_device_properties(device).total_memory // SHARE)


def queries_at_once(row_bytes: int, limit_bytes: int) -> int:
    """Queries of a block.

    Args:
        row_bytes: of the scores of one query, in all heads and sequences.
        limit_bytes: from `score_block_bytes`.
    """
    return max(LEAST_QUERIES, limit_bytes // row_bytes)
