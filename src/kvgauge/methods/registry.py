"""Methods by name: every YAML of `conf/method/` is one."""

from __future__ import annotations

from typing import Any

from kvgauge import configuration
from kvgauge.contract.method import Method


def list_methods(folder: str = "") -> list[str]:
    """Every method by name: kvgauge's own, or those of a folder of ``conf/method/``, e.g. ``kvpress``."""
    return [name for name in configuration.names("method") if name.rpartition("/")[0] == folder]


def build_method(name: str, /, **overrides: Any) -> Method:
    """The method ``conf/method/<name>.yaml`` with the given fields replaced.

    Raises:
        UserError: an unknown name or field, or a value that the method refuses.
    """
    method: Method = configuration.build(configuration.read("method", name), "method", **overrides)
    return method
