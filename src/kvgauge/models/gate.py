"""Whether a model is measured at all: the uncompressed cache must be the model itself, as transformers runs it.

At the first use of a model, random tokens are read twice: with this package's attention and the uncompressed cache, and
with transformers' own eager attention and its own cache. A padded batch is read in two passes, then token by token, on
a copy of the first layers in float32 whose windows are shorter than the batch. Where logits differ, some of what the
model does is not computed here, and every number measured on it would be another model's: it is refused.

Beside that, layer by layer: what is cached has the shapes that the facts say, and how keys turn with their positions is
found by turning keys that the model's own code made (`kvgauge.architecture.rotation`). Layers where that is not known
are no obstacle to methods that turn nothing.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvgauge import fingerprint
from kvgauge.architecture.facts import ModelFacts, model_facts
from kvgauge.architecture.glimpse import glimpse
from kvgauge.architecture.kinds import Kind, own_cache
from kvgauge.architecture.prompt_length import prompt_length, release_length
from kvgauge.architecture.rotations import described, layer_rotations
from kvgauge.attend import attention
from kvgauge.errors import UserError
from kvgauge.layers.building import exact_cache
from kvgauge.layers.cache import KVCache
from kvgauge.models import narrow_linear
from kvgauge.models.cut_down import cut_down
from kvgauge.models.identity import model_fingerprint
from kvgauge.user_cache import cache_root

ALLOWED = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative difference of the logits of a token, by the dtype of the models that are compared."""

MOST_PARAMETERS = 2 * 10**9  # of the copy in float32
ROWS, PADDING, PASSES, STEPS = 2, 9, (50, 20), 4
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")
NARROW = 24  # tokens of a window, which a few tokens pass
LONGEST = 160  # characters of another library's error in a message
QUANTILE = 0.75  # of the tokens of a part: a rounding may send a token to another expert


@dataclass(frozen=True)
class LayerFinding:
    """What was found of one layer.

    Attributes:
        index: of the layer in the cache.
        kind: a value of `kvgauge.architecture.kinds.Kind`.
        compressible: methods compress it.
        features: what it has that others do not, in words.
        rotation: what its keys go through, in words; empty where it was not looked for.
        error: of keys turned by that rotation, against the model's own.
        reason: why its rotation is not known; None where it is, or need not be.
    """

    index: int
    kind: str
    compressible: bool
    features: tuple[str, ...] = ()
    rotation: str = ""
    error: float = 0.0
    reason: str | None = None


@dataclass(frozen=True)
class GateReport:
    """What the gate found of a model.

    Attributes:
        model: the name of its class.
        refused: why it cannot be measured, in one line; None: it can.
        turning: why methods that turn keys to other positions cannot serve it, in one line; None: they can.
        difference: of its logits from transformers' own, relative.
        allowed: the largest difference that passes.
        passes: transformers itself gives the same logits for a prompt in one pass and in several; without that a
            context cannot be compressed before its question, and the model is refused.
        layers: what was found of each.
        seconds: that it took.
    """

    model: str
    refused: str | None
    turning: str | None
    difference: float
    allowed: float
    passes: bool
    layers: tuple[LayerFinding, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON-like data."""
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> GateReport:
        """The inverse of `to_dict`."""
        layers = tuple(LayerFinding(**{**layer, "features": tuple(layer["features"])}) for layer in data["layers"])
        return cls(**{**data, "layers": layers})


def require(model: PreTrainedModel) -> GateReport:
    """`check_model`, for those who would go on.

    Raises:
        UserError: the model is refused.
    """
    report = check_model(model)
    if report.refused is not None:
        raise UserError(report.refused)
    return report


def check_model(model: PreTrainedModel, *, again: bool = False) -> GateReport:
    """What the gate finds of `model`, remembered by its fingerprint and that of the code.

    Args:
        model: any decoder, with this package's attention set (`kvgauge.models.attaching.attach`).
        again: do not look at what is remembered.
    """
    path = _remembered_at(model)
    if path.is_file() and not again:
        return GateReport.of(json.loads(path.read_text()))
    start = time.perf_counter()
    report = _checked(model, lambda: round(time.perf_counter() - start, 3))
    _remember(path, report)
    return report


def _checked(model: PreTrainedModel, seconds: Callable[[], float]) -> GateReport:
    name = type(model).__name__
    allowed = ALLOWED[torch.float32]
    try:
        facts = model_facts(model)
        _check_shapes(model, facts)
        layers = _findings(model, facts)
        difference, allowed, passes = _difference(model)
    except UserError as error:
        return GateReport(name, str(error), str(error), float("inf"), allowed, False, (), seconds())
    refused = None
    if not difference <= allowed:
        features = sorted({feature for layer in layers for feature in layer.features})
        refused = (
            f"{name} is not computed as transformers computes it (logits differ by {difference:.1e}, "
            f"{allowed:.0e} is allowed): it cannot be measured; it has {', '.join(features) or 'no special features'}"
        )
    elif not passes:
        refused = (
            f"{name} gives other logits when transformers reads a prompt in several passes (a context, then a "
            f"question): it loses the states of its layers between them, and cannot be measured"
        )
    turning = refused or next((layer.reason for layer in layers if layer.reason is not None), None)
    return GateReport(name, refused, turning, difference, allowed, passes, layers, seconds())


def _check_shapes(model: PreTrainedModel, facts: ModelFacts) -> None:
    """What is cached is what the facts say.

    Raises:
        UserError: it is something else, or is kept elsewhere.
    """
    if model.config.get_text_config(decoder=True)._attn_implementation != attention.NAME:
        raise UserError(f"{facts.name} has attention code of its own that cannot be replaced: not supported")
    if any(layer.kind is Kind.SPARSE for layer in facts.layers):
        raise UserError(f"{facts.name} attends to tokens that an indexer chooses (sparse attention): not supported")
    if not facts.layers:
        raise UserError(f"{facts.name} has no layers that cache anything: not supported")
    seen = glimpse(model, [0])
    for layer in facts.layers:
        if layer.kind is Kind.LINEAR and not layer.state_nbytes:
            raise UserError(f"{facts.name} keeps states elsewhere than in its cache, where prompts meet: not supported")
        if layer.index in seen.keys and not layer.cached_width:
            raise UserError(
                f"layer {layer.index} of {facts.name} caches and has no attention of its own: not supported"
            )
        if layer.cached_width and layer.index not in seen.keys:
            raise UserError(f"layer {layer.index} of {facts.name} attends and caches nothing: not supported")
        if layer.cached_width:
            found = seen.keys[layer.index].shape[-2:], seen.values[layer.index].shape[-2:]
            heads = layer.num_key_value_heads
            if found != ((heads, layer.head_dim), (heads, layer.value_head_dim)):
                raise UserError(
                    f"layer {layer.index} of {facts.name} caches keys {tuple(found[0])} and values {tuple(found[1])}, "
                    f"its configuration says {heads} heads of {layer.head_dim} and {layer.value_head_dim}"
                )


def _findings(model: PreTrainedModel, facts: ModelFacts) -> tuple[LayerFinding, ...]:
    try:
        with prompt_length(model, min(facts.max_positions, 64)):
            rotations = dict(zip(facts.compressed, layer_rotations(model), strict=True))
    except UserError as error:
        rotations = dict.fromkeys(facts.compressed, str(error))
    found = []
    for layer in facts.layers:
        rotation = rotations.get(layer.index, "")
        known = None if isinstance(rotation, str) else rotation
        found.append(
            LayerFinding(
                layer.index,
                layer.kind.value,
                layer.compressible,
                layer.features,
                "" if known is None else described(known),
                0.0 if known is None else known.error,
                rotation or None if isinstance(rotation, str) else None,
            )
        )
    return tuple(found)


def _difference(model: PreTrainedModel) -> tuple[float, float, bool]:
    """How far logits are from transformers' own, what is allowed, and whether its own do not depend on passes."""
    small = cut_down(model, MOST_PARAMETERS)
    compared = model if small is None else small
    vocabulary = compared.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (ROWS, sum(PASSES) + STEPS), generator=generator)
    ids = ids.to(compared.device)
    mask = torch.ones_like(ids)
    mask[1:, :PADDING] = 0
    cuts = (*PASSES, *(1,) * STEPS)
    with _narrowed(compared):
        with _of_transformers(compared), _refusing(model, "does not run as transformers itself has it"):
            theirs = _read(compared, own_cache(compared.config), ids, mask, cuts)
            whole = _read(compared, own_cache(compared.config), ids, mask, (ids.shape[1],))
        with _refusing(model, "uses cached keys outside of its attention function"):
            ours = _read(compared, exact_cache(compared), ids, mask, cuts)
    allowed = ALLOWED[compared.dtype]
    parts = (slice(0, sum(PASSES)), slice(sum(PASSES), None))
    valid = mask.bool()
    pieces = [(row, part) for row in range(ROWS) for part in parts]
    difference = max(_apart(ours[piece], theirs[piece], valid[piece]) for piece in pieces)
    passes = max(_apart(theirs[row], whole[row], valid[row]) for row in range(ROWS)) <= 10 * allowed
    return difference, allowed, passes


def _apart(found: Tensor, expected: Tensor, valid: Tensor) -> float:
    """Relative differences of the logits of tokens (tokens, vocabulary), at `QUANTILE`."""
    found, expected = found[valid].double(), expected[valid].double()
    each = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    return float(each.quantile(QUANTILE)) if bool(each.isfinite().all()) else float("inf")


@torch.no_grad()
def _read(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """Logits of passes of so many tokens; ours is compressed, which changes nothing, before the first single one."""
    release_length(model)
    parts, end = [], 0
    for part in ids.split(list(cuts), dim=1):
        if part.shape[1] == 1 and isinstance(cache, KVCache):
            cache.compress()
        end += part.shape[1]
        parts.append(model(input_ids=part, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, dim=1)


@contextmanager
def _of_transformers(model: PreTrainedModel) -> Iterator[None]:
    """`model` without what this package does to it."""
    narrow_linear.remove(model)
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(attention.NAME)
        narrow_linear.install(model)


@contextmanager
def _refusing(model: PreTrainedModel, reason: str) -> Iterator[None]:
    """Whatever goes wrong inside is a reason to refuse the model."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{type(model).__name__} {reason} ({str(error)[:LONGEST]}): not supported") from error


@contextmanager
def _narrowed(model: PreTrainedModel) -> Iterator[None]:
    """`model` with windows and chunks that a few tokens pass; caches and masks are made from its configuration."""
    config = model.config.get_text_config(decoder=True)
    before = {name: getattr(config, name, None) for name in WINDOWS}
    before = {name: width for name, width in before.items() if isinstance(width, int) and width > NARROW}
    try:
        for name in before:
            setattr(config, name, NARROW)
        yield
    finally:
        for name, width in before.items():
            setattr(config, name, width)


def _remembered_at(model: PreTrainedModel) -> Path:
    code = fingerprint.code_version(__name__)
    versions = f"{transformers.__version__}-{torch.__version__}-{model.device.type}"
    return cache_root() / "gate" / f"{model_fingerprint(model)}-{code}-{versions}.json"


def _remember(path: Path, report: GateReport) -> None:
    """Write a report, whole or not at all; where nothing can be written, the model is looked at again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as scratch:
            json.dump(report.to_dict(), scratch, indent=1)
        Path(scratch.name).replace(path)
    except OSError:
        return
