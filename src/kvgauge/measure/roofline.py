"""The bound of a decode step on an accelerator, from what a cell reads and computes: no cell can be faster.

A step reads all weights once and, in every layer, what that layer attends to. That is what the cell stores, but for a
cross-layer group: each of its G layers reads the whole basis that they share, so that a group reads G times what it
holds of it. Per layer and sequence, with T tokens, H query heads, N key/value heads, head_dim d, ranks r and s bytes a
number:

- uncompressed: reads ``2 N d s T``, computes ``4 H d T``;
- per-head latents: ``2 N r s T``, ``4 H r T``;
- cross-layer latents: ``(r_k + r_v) (T + N d) s``. Post-RoPE keys are absorbed, ``2 H (r_k + r_v) T``; pre-RoPE keys
  are rebuilt, ``2 r_k N d T + 2 H d T + 2 H r_v T``; with Selective Reconstruction of n tokens a head, the rows of at
  most ``n N`` tokens and a landmark for every chunk are read, and n tokens a head are rebuilt;
- merged or evicted entries: as uncompressed, of ``b T`` entries with a cardinality of 4 bytes a head;
- codes: the bytes of codes and scales, and a few integer operations for each number that is unpacked.

The layer takes the longest of its reads over the bandwidth, its operations over the peak, and its unpacking over the
integer rate; nothing else is counted: neither launches nor the Python between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvgauge.errors import UserError
from kvgauge.measure.accelerators import Accelerator
from kvgauge.measure.shape import Shape
from kvgauge.methods.across_layers.ranks import group_ranks, split

GROUP = 4  # layers of a cross-layer group
KEY_SHARE = 0.4  # of its ranks
CHUNK, REBUILT = 16, 2048  # tokens of a chunk, and of those that Selective Reconstruction rebuilds for a head
CODE_NBYTES = 1.0625  # of a number in 8 bits, a float16 scale and minimum for 64 of them included
CARDINALITY_NBYTES = 4
UNPACK = 2  # integer operations for a number in 8 or 4 bits
KVQUANT_UNPACK = 6  # for a number that is looked up in a code book of 3 bits
OUTLIERS = 0.01  # of the numbers, which KVQuant keeps apart in a value and an index


@dataclass(frozen=True)
class Work:
    """Of one layer and one sequence in a decode step.

    Attributes:
        stored: bytes held for it.
        read: bytes read.
        flops: multiplications and additions.
        integer: integer operations.
    """

    stored: float
    read: float
    flops: float
    integer: float = 0.0


@dataclass(frozen=True)
class Bound:
    """A row of the table.

    Attributes:
        cell: what is estimated.
        stored, read: bytes over those of the uncompressed cache, held and read in a step.
        tpot_s: the bound of a step, seconds.
        tpot: the same over that of the uncompressed cache.
        limited_by: what takes the layer's time: ``bandwidth``, ``products`` or ``unpacking``.
        can_win: whether the bound is below that of the uncompressed cache.
    """

    cell: str
    stored: float
    read: float
    tpot_s: float
    tpot: float
    limited_by: str
    can_win: bool


def full(shape: Shape, tokens: int) -> Work:
    """The uncompressed cache."""
    facts = shape.facts
    held = facts.cached_width * facts.dtype.itemsize * tokens
    return Work(held, held, 4.0 * facts.num_attention_heads * facts.head_dim * tokens)


def per_head(shape: Shape, tokens: int, budget: float) -> Work:
    """KQ-SVD, Eigen and K-SVD."""
    facts = shape.facts
    rank = int(facts.head_dim * budget)
    held = 2 * facts.num_key_value_heads * rank * facts.dtype.itemsize * tokens
    return Work(held, held, 4.0 * facts.num_attention_heads * rank * tokens)


def cross_layer(shape: Shape, tokens: int, budget: float, keys: str = "absorbed", number: float | None = None) -> Work:
    """xKV.

    Args:
        shape: of the model.
        tokens: of the context.
        budget: share of the uncompressed bytes.
        keys: ``absorbed`` (post-RoPE), ``rebuilt`` (pre-RoPE), or ``selected`` (Selective Reconstruction).
        number: bytes of a number of bases and factors; None: as many as the model's, and nothing is unpacked.
    """
    facts, size = shape.facts, float(shape.facts.dtype.itemsize)
    heads, width = facts.num_attention_heads, facts.num_key_value_heads * facts.head_dim
    features, held = GROUP * width, number or size
    landmarks = tokens / CHUNK * width * size if keys == "selected" else 0.0
    numbers = (budget * 2 * width * tokens * size - landmarks) * GROUP / held
    total = group_ranks(numbers, tokens, [features], subspaces=2)[0]
    rank_k, rank_v = split(total, min(tokens, features), KEY_SHARE)
    stored = total * (tokens + features) * held / GROUP
    read, factors = total * tokens * held, total * width * held
    unpacked = 0.0 if number is None else float(UNPACK * total * tokens)
    if keys == "absorbed":
        return Work(stored, read + factors, 2.0 * heads * total * tokens, unpacked)
    if keys == "rebuilt":
        flops = 2.0 * rank_k * width * tokens + 2.0 * heads * (facts.head_dim + rank_v) * tokens
        return Work(stored, read + factors, flops, unpacked)
    rows = min(tokens, REBUILT * facts.num_key_value_heads)
    flops = REBUILT * (2.0 * rank_k * width + 2.0 * heads * rank_v)
    return Work(stored + landmarks, total * rows * held + landmarks + factors, flops, unpacked * rows / tokens)


def entries(shape: Shape, tokens: int, budget: float) -> Work:
    """Merged entries; evicted ones are the same without a cardinality."""
    facts = shape.facts
    kept = budget * tokens
    held = (facts.cached_width * facts.dtype.itemsize + CARDINALITY_NBYTES * facts.num_key_value_heads) * kept
    return Work(held, held, 4.0 * facts.num_attention_heads * facts.head_dim * kept)


def codes(shape: Shape, tokens: int, bits: int, group: int = 64) -> Work:
    """Keys and values in packed codes, a float16 scale and minimum for `group` numbers."""
    whole, facts = full(shape, tokens), shape.facts
    held = facts.cached_width * (bits / 8 + 4 / group) * tokens
    return Work(held, held, whole.flops, UNPACK * facts.cached_width * tokens)


def kvquant(shape: Shape, tokens: int, bits: int = 3, unpack: int = KVQUANT_UNPACK) -> Work:
    """KVQuant: codes of a code book, a scale and an offset of 2 bytes a token for the values, and sparse outliers."""
    whole, width = full(shape, tokens), shape.facts.cached_width
    sparse = 2 * (2 + OUTLIERS * width / 2 * 4)  # a row pointer, and value and index of each outlier, keys and values
    held = (width * bits / 8 + 4 + sparse) * tokens
    return Work(held, held, whole.flops, unpack * width * tokens)


Cell = Callable[[Shape, int], Work]

CELLS: dict[str, Cell] = {
    "full": full,
    "full+int8": lambda shape, tokens: codes(shape, tokens, 8),
    "full+int4": lambda shape, tokens: codes(shape, tokens, 4),
    "kqsvd@0.5": lambda shape, tokens: per_head(shape, tokens, 0.5),
    "kqsvd@0.25": lambda shape, tokens: per_head(shape, tokens, 0.25),
    f"xkv{GROUP}@0.25, pre-RoPE": lambda shape, tokens: cross_layer(shape, tokens, 0.25, "rebuilt"),
    f"xkv{GROUP}@0.25, post-RoPE": lambda shape, tokens: cross_layer(shape, tokens, 0.25),
    f"xkv{GROUP}@0.125, post-RoPE": lambda shape, tokens: cross_layer(shape, tokens, 0.125),
    f"xkv{GROUP}+int8@0.125, post-RoPE": lambda shape, tokens: cross_layer(
        shape, tokens, 0.125, "absorbed", CODE_NBYTES
    ),
    f"xkv{GROUP}@0.25, SR {REBUILT}": lambda shape, tokens: cross_layer(shape, tokens, 0.25, "selected"),
    "kvslimmer@0.25": lambda shape, tokens: entries(shape, tokens, 0.25),
    "kvquant 3 bits": lambda shape, tokens: kvquant(shape, tokens, unpack=0),
    f"kvquant 3 bits, {KVQUANT_UNPACK} operations a number": kvquant,
}


def bounds(
    shape: Shape, tokens: int, batch: int, device: Accelerator, efficiency: float = 1.0, cells: Sequence[str] = ()
) -> list[Bound]:
    """The table, the uncompressed cache first.

    Args:
        shape: of a model whose layers all cache keys and values per head.
        tokens: of each sequence.
        batch: sequences.
        device: what it runs on.
        efficiency: share of the peak that products reach, in (0, 1].
        cells: of `CELLS`; none: all.

    Raises:
        UserError: a model whose layers are not alike, or caches latents; numbers out of range.
    """
    facts = shape.facts
    if facts.latent is not None or not facts.uniform or facts.num_layers != len(facts.layers):
        raise UserError(
            f"the roofline is for models whose layers all cache keys and values alike, not for {facts.name}"
        )
    if tokens < 1 or batch < 1 or not 0 < efficiency <= 1:
        raise UserError("tokens and batch have to be 1 or more, and the share of the peak in (0, 1]")
    weights = shape.read_nbytes / device.bandwidth
    whole = full(shape, tokens)

    def step(work: Work) -> tuple[float, str]:
        times = {
            "bandwidth": batch * work.read / device.bandwidth,
            "products": batch * work.flops / (device.flops * efficiency),
            "unpacking": batch * work.integer / device.integer,
        }
        longest = max(times, key=lambda name: times[name])
        return facts.num_layers * times[longest] + weights, longest

    base, _ = step(whole)
    rows = []
    for cell in cells or CELLS:
        work = CELLS[cell](shape, tokens)
        seconds, limit = step(work)
        ratio = seconds / base
        rows.append(
            Bound(cell, work.stored / whole.stored, work.read / whole.read, seconds, ratio, limit, seconds < base)
        )
    return rows
