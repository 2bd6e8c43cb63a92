"""The optional package kvpress (Apache-2.0): its presses by name, without what importing it does to transformers."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from functools import cache
from importlib.metadata import version
from types import ModuleType
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvgauge.attend import attention
from kvgauge.errors import UserError

INSTALL = "pip install 'cachetools<6' 'fire<0.7' requests && pip install --no-deps kvpress==0.5.5"
BASES = ("BasePress", "ScorerPress")


@cache
def library() -> ModuleType:
    """The package.

    On import it replaces transformers' attention functions by ones that read ``key.shape``. Ours may be handed a cache
    layer in the place of the keys and masks by itself, so the functions are put back.

    Raises:
        UserError: it is not installed, or does not load.
    """
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    if attention.NAME in before:
        before[attention.NAME] = attention.attention_forward
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # its warnings repeat what its documentation says
    try:
        return importlib.import_module("kvpress")
    except ImportError as error:
        raise UserError(f"methods of kvpress need the package kvpress ({error}): {INSTALL}") from error
    finally:
        for name, function in before.items():
            if ALL_ATTENTION_FUNCTIONS[name] is not function:
                ALL_ATTENTION_FUNCTIONS[name] = function


def library_version() -> str:
    """Of the installed package."""
    library()
    return version("kvpress")


@cache
def presses() -> dict[str, type[Any]]:
    """Every press class by the name of its method, e.g. ``snapkv``.

    The name is that of its module (``snapkv_press``) where it says the same as the class, else the class in snake case.
    """
    module = library()
    classes = [getattr(module, name) for name in module.__all__ if name.endswith("Press") and name not in BASES]
    return dict(sorted((_name(cls), cls) for cls in classes))


def _name(cls: type[Any]) -> str:
    bare = cls.__name__.removesuffix("Press")
    stem = cls.__module__.rpartition(".")[2].removesuffix("_press")
    if stem.replace("_", "") == bare.lower():
        return stem
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", bare.replace("KV", "kv")).lower()


def parameters(cls: type[Any]) -> dict[str, Any]:
    """The parameters of a press and their defaults, ``inspect.Parameter.empty`` where there is none.

    Without its compression ratio, which follows from the budget.
    """
    found = inspect.signature(cls).parameters
    return {name: found[name].default for name in found if name != "compression_ratio" and not name.startswith("_")}
