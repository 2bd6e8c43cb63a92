"""One loader for every kind of model: a name of `conf/model/`, a hub id, a directory, or a GGUF file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from kvgauge import configuration
from kvgauge.errors import UserError, unknown
from kvgauge.models.attaching import attach
from kvgauge.models.chat_template import fix_template
from kvgauge.models.devices import check_device, moved, too_large
from kvgauge.models.gate import require
from kvgauge.models.gguf import dense_checkpoint
from kvgauge.models.overrides import overridden
from kvgauge.models.spec import ModelSpec
from kvgauge.models.squeezellm_store import squeeze_model
from kvgauge.models.tiny import byte_tokenizer, random_model
from kvgauge.models.wheels import carried


def model_spec(name: str, **overrides: object) -> ModelSpec:
    """The `ModelSpec` of a name: a file of ``conf/model/``, else a hub id, a directory or a ``.gguf`` file.

    Raises:
        UserError: the name is none of these.
    """
    if name in configuration.names("model"):
        return configuration.build(configuration.read("model", name), "model", **overrides)
    if Path(name).exists() or name.count("/") == 1:
        return ModelSpec(**({"name": name, "source": name} | overrides))  # type: ignore[arg-type]
    raise unknown("model", name, configuration.names("model"))


def load_model(
    name: str | ModelSpec, *, dtype: str | torch.dtype | None = None, device: str | None = None, **overrides: object
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for evaluation, with kvgauge's attention function set, and its tokenizer (left padding).

    Args:
        name: a name of ``conf/model/`` ("smollm2-135m", "tiny/llama"), a hub id, a directory, a ``.gguf`` file, or a
            `ModelSpec`.
        dtype: one of `kvgauge.models.spec.DTYPES`, by its name or torch's own; None keeps the configuration's.
        device: a torch device, or ``auto``; None keeps the configuration's.
        overrides: other fields of `ModelSpec`.

    Raises:
        UserError: an unknown name, a missing file or package, a hub model that cannot be reached, a device that is
            not here, lacks the dtype or is too small, or a model that this package's attention does not compute as
            transformers does (`kvgauge.models.gate`).
    """
    wanted = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    chosen: dict[str, object] = {"dtype": wanted, "device": device} | overrides
    chosen = {key: value for key, value in chosen.items() if value is not None}
    if isinstance(name, ModelSpec):
        spec = (
            configuration.build({"_target_": "kvgauge.models.spec.ModelSpec"} | vars(name), "model", **chosen)
            if chosen
            else name
        )
    else:
        spec = model_spec(name, **chosen)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # a log file has no use for hundreds of states of a bar
    if spec.device_map is None:
        check_device(spec.torch_device, spec.torch_dtype)
    if spec.source == "random":
        model = random_model(spec)
    else:
        checkpoint = _checkpoint(spec)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint,
                config=overridden(_config(spec, checkpoint), spec.config, spec.name) if spec.config else None,
                dtype=spec.torch_dtype,
                device_map=spec.device_map,
                revision=spec.revision,
                trust_remote_code=spec.trust_remote_code,
            )
        except torch.OutOfMemoryError as error:
            raise too_large(spec.name, f"the devices of device_map={spec.device_map}") from error
        except (OSError, ValueError) as error:
            raise _unreachable(spec, error) from error
    if spec.device_map is None:
        model = moved(model, spec.torch_device, spec.name)
    model.eval().requires_grad_(False)
    tokenizer = load_tokenizer(spec)
    options = spec.squeezed()
    if options is not None:
        squeeze_model(model, tokenizer, options)
    attach(model)
    require(model)
    return model, tokenizer


def model_config(name: str | ModelSpec) -> PreTrainedConfig:
    """The configuration of a model, without its weights. Arguments and errors as `load_model`."""
    spec = name if isinstance(name, ModelSpec) else model_spec(name)
    if spec.source == "random":
        return random_model(spec).config
    try:
        found = _config(spec, _checkpoint(spec))
    except (OSError, ValueError) as error:
        raise _unreachable(spec, error) from error
    return overridden(found, spec.config, spec.name) if spec.config else found


def load_tokenizer(name: str | ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights. Arguments and errors as `load_model`."""
    spec = name if isinstance(name, ModelSpec) else model_spec(name)
    if spec.source == "random":
        tokenizer = byte_tokenizer()
        fix_template(tokenizer, spec.chat_template_kwargs or {}, spec.date)
        return tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _checkpoint(spec), revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _unreachable(spec, error) from error
    fix_template(tokenizer, spec.chat_template_kwargs or {}, spec.date)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _config(spec: ModelSpec, checkpoint: str) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(checkpoint, revision=spec.revision, trust_remote_code=spec.trust_remote_code)


def _checkpoint(spec: ModelSpec) -> str:
    """What transformers can load: a directory (GGUF files are converted) or a hub id."""
    if spec.source.startswith("wheel:"):
        return str(dense_checkpoint(*carried(spec.source.removeprefix("wheel:"), spec.name)))
    path = Path(spec.source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model {spec.name}: no such GGUF file: {path}")
        return str(dense_checkpoint(path.resolve()))
    return spec.source


def _unreachable(spec: ModelSpec, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    if Path(spec.source).exists():
        return UserError(f"model {spec.name}: cannot load {spec.source}: {reason}")
    return UserError(
        f"model {spec.name}: {spec.source} is not in the local hub cache and the hub cannot be reached ({reason}): "
        f"unset HF_HUB_OFFLINE and log in, download it first with `hf download {spec.source}`, "
        f"or give a directory or a .gguf file as model.source"
    )
