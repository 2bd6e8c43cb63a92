"""A cache that a press of kvpress prunes: the press's own code, our storage, our bytes.

A press works on one attention module at a time: on its input, and on the keys and values it cached. kvpress calls it
from a hook behind the module, in a prefill of one forward pass. Here a hook in front of the module keeps the input, and
the press is called when the cache is compressed: the prefill may then come in chunks, end behind the context or behind
the question, and be anybody's loop. Until then the inputs are in memory, besides the exact keys and values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from kvgauge.architecture.facts import attention_modules, full_nbytes
from kvgauge.architecture.rotary import Rotary
from kvgauge.attend.attention import exact_attention
from kvgauge.attend.mask import Mask
from kvgauge.contract.budget import ROUNDING
from kvgauge.errors import UserError
from kvgauge.layers.adoption import Prefill
from kvgauge.layers.cache import KVCache
from kvgauge.layers.inputs import LayerInputs
from kvgauge.layers.pair import PairLayer
from kvgauge.methods.pressed.kvpress_library import library
from kvgauge.store.buffers import GrowingBuffer

BUDGET_TOLERANCE = 1.02  # measured bytes over the budget: presses work in whole tokens or chunks


class PressedLayer(PairLayer):
    """What a press left of the context, and exact tokens behind it."""

    def __init__(self) -> None:
        super().__init__(GrowingBuffer(), GrowingBuffer())
        self.kept: Tensor | None = None  # (batch, num_key_value_heads, context entries), False where a press masks
        self.context_tokens = self.context_entries = 0

    def store(self, keys: Tensor, values: Tensor) -> None:
        self.context_tokens, self.context_entries = self.logical_length, keys.shape[2]
        self.keys_buffer.set(keys)
        self.values_buffer.set(values)

    def mask(self, masked: Sequence[Tensor]) -> None:
        """Hide entries: their batch rows, heads and columns, all of one length."""
        kept = torch.ones(self.keys_buffer.dense().shape[:3], dtype=torch.bool, device=self.device)
        kept[tuple(index.to(kept.device) for index in masked)] = False
        self.kept = kept

    @property
    def pruned(self) -> bool:
        """Entries are gone or masked."""
        return self.kept is not None or self.context_entries != self.context_tokens

    def attend_compressed(self, query: Tensor, mask: Mask, scaling: float) -> Tensor:
        mask = self._entries_seen(query, mask) if self.pruned else mask
        return exact_attention(query, self.keys_buffer.dense(), self.values_buffer.dense(), mask, scaling)

    def _entries_seen(self, query: Tensor, mask: Mask) -> Mask:
        """Which entries each query sees: all of the context but what is masked."""
        if self.kept is None:
            return mask.replaced(0, self.context_tokens, self.context_entries)
        behind = mask.whole(query.shape[2], self.logical_length, query.device).behind(self.context_tokens)
        return behind.led_by_seen(self.kept.repeat_interleave(query.shape[1] // self.kept.shape[1], dim=1))

    @property
    def physical_length(self) -> int:
        return len(self.keys_buffer) if self.compressed else self.logical_length

    def compressed_nbytes_by_part(self) -> dict[str, int]:
        parts = super().compressed_nbytes_by_part()
        return parts if self.kept is None else parts | {"mask": self.kept.nbytes}

    def compressed_dense(self) -> tuple[Tensor, Tensor]:
        if self.pruned:
            raise UserError("entries of the context are gone, so that no others can be compared with them: use full")
        return self.keys_buffer.dense(), self.values_buffer.dense()

    def crop_compressed(self, tokens: int) -> None:
        if tokens < self.context_tokens:
            raise UserError("a pruned context cannot be cropped, only what follows it: start a new cache")
        for buffer in self.buffers():
            buffer.crop(self.context_entries + tokens - self.context_tokens)

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        super().map_batch(select)
        self.kept = None if self.kept is None else select(self.kept)

    def reset(self) -> None:
        super().reset()
        self.kept = None
        self.context_tokens = self.context_entries = 0


class PressedCache(KVCache):
    """A cache of pressed layers.

    Args:
        name: of the method, for error messages.
        model: the cache's.
        press: of kvpress, of this cache alone; None keeps everything.
        budget: share of the uncompressed bytes that the pruned context may take; None does not check.
        kept: share of all tokens that a compression while decoding leaves.
        one_sequence: what the press chooses for a row depends on the other rows, or it takes only one.
        rerotates: the press turns the keys it keeps to the positions 0, 1, 2, …
        replays: the press runs passes of its own over the context.
        context_length: as in `KVCache`.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        press: Any,
        *,
        budget: float | None,
        kept: float,
        one_sequence: bool,
        rerotates: bool,
        replays: bool,
        context_length: int | None,
    ) -> None:
        modules = attention_modules(model)
        super().__init__([PressedLayer() for _ in modules], context_length=context_length)
        self.name, self.model, self.press, self.budget, self.kept = name, model, press, budget, kept
        self._watched_from = 0  # the first token whose inputs are kept
        self.one_sequence, self.rerotates, self.replays = one_sequence, rerotates, replays
        if press is not None:
            self.prefill = Prefill.OWN if replays else Prefill.WATCHED
        self.ids: list[Tensor] = []  # (batch, tokens) of each forward pass, for a press that replays
        self._watch()

    # -- watching the prefill ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Keep what the attention modules are given by passes that fill this cache, until it is compressed or gone."""
        self._watch_inputs()
        mine: weakref.ref[PressedCache] = weakref.ref(self)

        def remember(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            cache = mine()
            filled: Any = kwargs.get("past_key_values")
            if cache is not None and filled is cache:
                cache.ids.append(kwargs["input_ids"])

        handles = []
        if self.replays:
            handles.append(self.model.get_decoder().register_forward_pre_hook(remember, with_kwargs=True))
        self._unwatch = weakref.finalize(self, _remove, handles)

    def _watch_inputs(self) -> None:
        """Keep what the attention modules are given from the next pass on."""
        self._watched_from = self.get_seq_length()
        self.inputs = None if self.press is None else LayerInputs(self.model, self)

    def check_batch(self, batch: int) -> None:
        if self.press is None:
            return
        if self.valid is not None and not bool(self.valid.all()):
            raise UserError(f"{self.name} knows no padding: run prompts of different lengths with batch_size=1")
        if self.one_sequence and batch > 1 and not self.compressed:
            raise UserError(f"{self.name} does not prune the sequences of a batch one by one: use batch_size=1")

    # -- compression ---------------------------------------------------------------------------------------------

    def compress_layers(self) -> None:
        self._unwatch()
        if self.press is None:
            super().compress_layers()
            return
        assert self.inputs is not None
        self.inputs.stop()
        modules = attention_modules(self.model)
        with self._at_work(modules):
            if self.replays:
                self._replay(modules)
            else:
                for layer, module in zip(self.own, modules, strict=True):
                    self._press(layer, module)
        self.inputs = None
        self._check()
        if self.every is not None:
            self._watch_inputs()

    def compress_again(self) -> None:
        """Prune all that is cached by kvpress' `DecodingPress`, to its share of the longer sequence."""
        if self.press is None:
            super().compress_again()
            return
        assert self.inputs is not None
        self.inputs.stop()
        modules = attention_modules(self.model)
        entries = int(self.kept * self.get_seq_length() * (1 + ROUNDING))
        press = library().DecodingPress(base_press=self.press, compression_interval=1, target_size=entries)
        with self._at_work(modules):
            for layer, module in zip(self.own, modules, strict=True):
                held = SimpleNamespace(keys=layer.keys_buffer.dense(), values=layer.values_buffer.dense())
                self._hook(press, layer, module, held, most=press.hidden_states_buffer_size)
                self._take(layer, module, held)
        self._watch_inputs()

    @contextmanager
    def _at_work(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """What a press finds when it works, and its errors in one line."""
        try:
            with _prepared(self.model, modules), _quiet(), torch.random.fork_rng():
                torch.manual_seed(0)  # presses that draw random numbers draw the same ones for every prompt
                yield
        except UserError:
            raise
        except Exception as error:  # whatever a press of somebody else's raises
            raise UserError(
                f"{self.name} failed with {describe(error)}: change its parameters or the prompt"
            ) from error

    def _press(self, layer: Any, module: nn.Module) -> None:
        keys, tokens = layer.exact_keys.view(), layer.logical_length
        held = SimpleNamespace(keys=keys, values=layer.exact_values.view())
        self._hook(self.press, layer, module, held)
        if self.rerotates and held.keys is not keys:
            # Queries keep counting the tokens of the context: the entries move up to stand right before them.
            offset = torch.tensor([[tokens - held.keys.shape[2]]], device=keys.device)
            held.keys = Rotary(self.model).shift(held.keys, offset)
        self._take(layer, module, held)

    def _hook(self, press: Any, layer: Any, module: nn.Module, held: Any, most: int | None = None) -> None:
        """Call a press as kvpress does behind a module; it replaces keys and values in `held`.

        Args:
            most: tokens, the newest, whose inputs it is shown; None shows all that were kept.
        """
        assert self.inputs is not None
        known_input = self.inputs.layers[layer.index]
        if known_input is None:
            raise UserError(f"{self.name} needs what the model computes of a prompt: latency.prefill=real gives it one")
        hidden, cos, sin = known_input if most is None else (part[:, -most:] for part in known_input)
        positions = torch.arange(layer.logical_length - hidden.shape[1], layer.logical_length, device=hidden.device)
        known = {
            "hidden_states": hidden,
            "past_key_values": SimpleNamespace(layers={module.layer_idx: held}),
            "cache_position": positions,
            "position_ids": positions[None],
            "position_embeddings": (cos, sin),
        }
        press.forward_hook(module, (), known, (None, None))
        self.inputs.layers[layer.index] = None

    def _replay(self, modules: Sequence[nn.Module]) -> None:
        held = DynamicCache()
        for layer in self.own:
            held.update(layer.exact_keys.view(), layer.exact_values.view(), layer.index)
            layer.exact_keys.clear()
            layer.exact_values.clear()
        with self.press(self.model):
            # What the press would have seen of the prefill, had it been there.
            self.press._context_ids, self.press._cache = torch.cat(self.ids, dim=1), held
        self.ids.clear()
        for layer, module in zip(self.own, modules, strict=True):
            self._take(layer, module, held.layers[layer.index])

    def _take(self, layer: Any, module: nn.Module, held: Any) -> None:
        layer.store(held.keys, held.values)
        if module.masked_key_indices is not None:
            layer.mask(module.masked_key_indices)
        layer.exact_keys.clear()
        layer.exact_values.clear()
        layer.compressed = True

    def _check(self) -> None:
        batch = self.own[0].keys_buffer.dense().shape[0]
        share = self.nbytes() / (batch * full_nbytes(self.model, self.compressed_tokens))
        if self.budget is not None and share > self.budget * BUDGET_TOLERANCE:
            raise UserError(
                f"{self.name} holds {share:.3f} of the bytes of {self.compressed_tokens} tokens, more than the budget "
                f"of {self.budget:g}: give compression_ratio={1 - self.budget:g} instead to run it all the same"
            )

    @property
    def nominal_share(self) -> float | None:
        """The share of the cache that the press says it keeps, after the compression; None where it cannot tell."""
        try:
            return 1.0 if self.press is None else 1.0 - float(self.press.compression_ratio)
        except (AttributeError, AssertionError, TypeError, ValueError):
            return None

    def _map_records(self, select: Callable[[Tensor], Tensor]) -> None:
        super()._map_records(select)
        self.ids = [select(ids) for ids in self.ids]
        if self.inputs is not None:
            self.inputs.map_batch(select)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.ids and tokens_to_remove:
            self.ids = [torch.cat(self.ids, dim=1)[:, : self.get_seq_length()]]
        if self.inputs is not None:
            self.inputs.crop(self.get_seq_length() - self._watched_from)

    def reset(self) -> None:
        super().reset()
        self.ids.clear()
        self._unwatch()
        self._watch()


def describe(error: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}({text[:160]})" if text else type(error).__name__


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


@contextmanager
def _prepared(model: PreTrainedModel, modules: Sequence[Any]) -> Iterator[None]:
    """Attributes of the attention modules that presses read and write, for as long as they work."""
    rotary: Any = getattr(model.get_decoder(), "rotary_emb", None)
    for module in modules:
        module.rotary_emb = rotary
        module.masked_key_indices = None
    try:
        yield
    finally:
        for module in modules:
            for name in ("rotary_emb", "masked_key_indices"):
                if hasattr(module, name):
                    delattr(module, name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on attention functions and the like."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
