"""Which model this is, and what its weights weigh."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel

from kvgauge.models.squeezellm import packed_buffers


def weights_nbytes(model: PreTrainedModel) -> int:
    """Bytes of the weights: dense ones, and squeezed ones as they are stored."""
    dense = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return dense + sum(buffer.nbytes for _, buffer in packed_buffers(model))


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash of the configuration and of a sample of every weight: the same model from another place is the same.

    64 values of every parameter are read, so that it takes milliseconds on a model of any size; a fine-tuned copy
    differs in practically all of them.
    """
    known = getattr(model, "_kvgauge_fingerprint", None)
    if known is not None:
        return str(known)
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"):
        config.pop(volatile, None)
    value = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in (*model.named_parameters(), *packed_buffers(model)):
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // 64)
        sample = flat[::stride][:64].to("cpu", torch.float32)
        value.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        value.update(sample.numpy().tobytes())
    model._kvgauge_fingerprint = value.hexdigest()[:16]
    return str(model._kvgauge_fingerprint)
