"""estimate: on paper, how many sequences fit on an accelerator and how fast a step can be, per method and budget.

    kvgauge estimate
    kvgauge estimate --model qwen2.5-7b-instruct-1m --gpu h200 --tokens 65536 --batch 8

Two tables, by default of Llama-3.1-8B at 131,072 tokens on an H100: how many sequences fit, and the bound of a decode
step of each cell (`kvgauge.measure.roofline`), which says what can ever be faster than the uncompressed cache. Nothing
is run: shapes come from the architecture's configuration, bytes from the formulas below. s is the bytes of a number, L
layers, N key/value heads, d head_dim, T tokens, D hidden_size, I intermediate_size, b the budget.

Cached bytes of one sequence:

- full: ``2 L N d s T``.
- per-head latents (K-SVD, Eigen, KQ-SVD): ``N s T Σ_l (r_k + r_v)``, the ranks as the budget resolves them; the
  projections ``2 N d s Σ_l (r_k + r_v)`` serve all sequences and are counted once.
- cross-layer latents (xKV, groups of G layers): ``s Σ_groups (r_k + r_v) (T + G N d)``, ``r_k = r_v`` the largest for
  which that is within the budget.
- merged or evicted entries (KVSlimmer, AsymKV, StreamingLLM): ``L N n (2 d s + 4)`` with ``n = ⌊b T⌋`` reduced so that
  a cardinality of 4 bytes per entry and head is paid for.

What else must fit while one more sequence is prefilled, the others being compressed already:

- weights, and the activations of a prefill chunk of c tokens, ``c (8 D + 3 I) s``;
- the exact cache of the sequence that comes in: all of it, ``2 L N d s T``, for methods that compress at the end of the
  prefill; one layer's chunk, ``2 N d s c``, for per-head latents with ``compress_prefill``; a window of ``w`` tokens in
  every layer, ``2 L N d s w``, for methods that merge as they go.

The bound of a decode step is the time to read the weights and all cached bytes once at the accelerator's bandwidth.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd
from transformers import LlamaConfig

from kvgauge.errors import UserError, unknown
from kvgauge.measure.accelerators import ACCELERATORS, Accelerator, accelerator
from kvgauge.measure.roofline import CARDINALITY_NBYTES, GROUP, Bound, bounds
from kvgauge.measure.shape import Shape
from kvgauge.methods.per_head.ranks import budget_ranks
from kvgauge.models.loading import model_config
from kvgauge.stage import CommandParser, fail

CHUNK = 4096  # tokens of a prefill chunk
WINDOW = 512  # tokens between two reductions of a merging method

LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)


@dataclass(frozen=True)
class Cost:
    """Bytes that a family of methods takes.

    Attributes:
        sequence: cached bytes of one sequence after compression.
        fixed: bytes that serve all sequences.
        incoming: exact bytes of the sequence that is being prefilled.
    """

    sequence: int
    fixed: int
    incoming: int


FAMILIES = ("full", "per-head", "per-head, compress_prefill", "cross-layer", "merged")


def cost(shape: Shape, family: str, budget: float, tokens: int) -> Cost:
    """The `Cost` of a family at a budget; see the module docstring for the formulas.

    Raises:
        UserError: an unknown family, or a budget that does not pay for rank 1 or for one entry.
    """
    facts = shape.facts
    size, width = facts.dtype.itemsize, facts.num_key_value_heads * facts.head_dim
    exact = facts.full_nbytes(tokens)
    if family == "full":
        return Cost(exact, 0, 0)
    if family.startswith("per-head"):
        numbers = 2.0 * facts.head_dim * budget
        ranks = sum(map(sum, budget_ranks(family, numbers, facts.num_layers, facts.head_dim)))
        per_rank = facts.num_key_value_heads * ranks * size
        streaming = family != "per-head"
        incoming = 2 * width * size * min(CHUNK, tokens) if streaming else exact
        return Cost(per_rank * tokens, 2 * facts.head_dim * per_rank, incoming)
    if family == "cross-layer":
        groups = -(-facts.num_layers // GROUP)
        per_rank = size * (groups * tokens + facts.num_layers * width)  # a basis column per group, a factor per layer
        rank = min(int(budget * exact / (2 * per_rank)), GROUP * width)
        if rank < 1:
            raise UserError(f"a budget of {budget:g} does not pay for rank 1 across layers: raise it")
        return Cost(2 * rank * per_rank, 0, exact)
    if family == "merged":
        entry = facts.num_layers * facts.num_key_value_heads * (2 * facts.head_dim * size + CARDINALITY_NBYTES)
        entries = min(int(budget * exact / entry), tokens)
        if entries < 1:
            raise UserError(f"a budget of {budget:g} does not pay for one entry: raise it")
        return Cost(entries * entry, 0, facts.full_nbytes(min(WINDOW, tokens)))
    raise unknown("family of methods", family, FAMILIES)


@dataclass(frozen=True)
class Estimate:
    """A row of the table.

    Attributes:
        family, budget: what is estimated.
        sequence_nbytes: cached bytes of one sequence.
        batch: the most sequences that fit; 0 where not one does.
        batch_after_prefill: the most that fit once all are compressed, as where another device prefills.
        step_s: bound of a decode step at `batch`, seconds; None where nothing fits.
        tokens_per_s: bound of the tokens decoded per second at `batch`.
    """

    family: str
    budget: float
    sequence_nbytes: int
    batch: int
    batch_after_prefill: int
    step_s: float | None
    tokens_per_s: float | None


def estimate(shape: Shape, family: str, budget: float, tokens: int, device: Accelerator) -> Estimate:
    """The largest batch of `tokens` tokens each, and what bounds its decode step.

    Raises:
        UserError: see `cost`.
    """
    facts, need = shape.facts, cost(shape, family, budget, tokens)
    activations = min(CHUNK, tokens) * (8 * facts.hidden_size + 3 * shape.intermediate_size) * facts.dtype.itemsize
    room = int(device.nbytes * device.usable) - shape.weight_nbytes - need.fixed
    at_rest = max(0, room // need.sequence)
    # The last sequence comes in while the others are compressed: its exact cache and its compressed copy meet once.
    coming_in = room - activations - need.incoming
    batch = max(0, coming_in // need.sequence)
    if not batch:
        return Estimate(family, budget, need.sequence, 0, at_rest, None, None)
    step = (shape.read_nbytes + need.fixed + batch * need.sequence) / device.bandwidth
    return Estimate(family, budget, need.sequence, batch, at_rest, step, batch / step)


def table(
    shape: Shape, tokens: int, device: Accelerator, budgets: Sequence[float] = (0.5, 0.25, 0.125)
) -> list[Estimate]:
    """All families: the uncompressed cache first, the others at every budget."""
    rows = [estimate(shape, "full", 1.0, tokens, device)]
    return rows + [estimate(shape, family, budget, tokens, device) for family in FAMILIES[1:] for budget in budgets]


def main() -> None:
    """Print both tables; the last line is JSON."""
    parser = CommandParser(__doc__)
    parser.add_argument("--model", help="a name of conf/model, a hub id or a directory; its configuration is enough")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(ACCELERATORS)}")
    parser.add_argument("--tokens", type=int, default=131072, help="of each sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences of the second table")
    parser.add_argument("--efficiency", type=float, default=1.0, help="share of the peak that products reach")
    options = parser.parse_args()
    try:
        if options.tokens < 1 or options.batch < 1:
            raise UserError("--tokens and --batch have to be 1 or more")
        device = accelerator(options.gpu)
        shape = Shape.of(LLAMA_3_1_8B if options.model is None else model_config(options.model))
        rows = table(shape, options.tokens, device)
        floors = bounds(shape, options.tokens, options.batch, device, options.efficiency)
    except UserError as error:
        fail(str(error))
    print(f"{options.model or 'Llama-3.1-8B'}, bfloat16, {options.tokens} tokens, {device.name}")
    print(f"\nHow many sequences fit: {device.usable:.0%} of the memory, weights {shape.weight_nbytes / 1e9:.2f} GB")
    print(_text(rows))
    print(f"\nThe bound of a decode step at batch {options.batch}; stored, read and TPOT over the uncompressed cache's")
    print(_text(floors))
    found = {"rows": [asdict(row) for row in rows], "bounds": [asdict(row) for row in floors]}
    print(json.dumps({"tokens": options.tokens, "batch": options.batch, "device": asdict(device)} | found))


def _text(rows: Sequence[Estimate] | Sequence[Bound]) -> str:
    return pd.DataFrame([asdict(row) for row in rows]).to_string(index=False, na_rep="-", float_format="%.4g")


if __name__ == "__main__":
    main()
