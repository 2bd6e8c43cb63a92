"""Methods by name: every YAML of `conf/method/` is one."""

from __future__ import annotations

from typing import Any

from kvgauge import configuration
from kvgauge.methods.base import Method


def list_methods() -> list[str]:
    """Every method by name."""
    return configuration.names("method")


def build_method(name: str, /, **overrides: Any) -> Method:
    """The method ``conf/method/<name>.yaml`` with the given fields replaced.

    Raises:
        UserError: an unknown name or field, or a value that the method refuses.
    """
    method: Method = configuration.build(configuration.read("method", name), "method", **overrides)
    return method
