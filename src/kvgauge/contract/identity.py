"""What makes one method another: its configuration, its code, and the libraries that it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from kvgauge.contract.method import Method
from kvgauge.contract.roles import Composite, fitter_of
from kvgauge.errors import UserError
from kvgauge.fingerprint import code_version


def config(method: Method) -> dict[str, Any]:
    """The fields of a method as JSON-like data."""
    return {field.name: getattr(method, field.name) for field in fields(method)}


def target(method: Method) -> dict[str, Any]:
    """The node that builds a method again: its class and its fields."""
    return {"_target_": f"{type(method).__module__}.{type(method).__qualname__}"} | config(method)


def method_version(method: Method) -> str:
    """A hash of the sources that decide what a method's caches do, and the versions of the libraries that it needs.

    Raises:
        UserError: a class that stands in no module.
    """
    return _version(list(_all(method)))


def fit_version(method: Method) -> str:
    """The same for what a method's fit computes."""
    return _version([fitter_of(method)])


def _all(method: Method) -> Iterator[Method]:
    yield method
    if isinstance(method, Composite):
        for part in method.parts:
            yield from _all(part)


def _version(methods: list[Method]) -> str:
    try:
        code = code_version(*(type(one).__module__ for one in methods))
    except ModuleNotFoundError as error:
        raise UserError(
            f"{methods[0].name} is no class of a module with a source ({error.name}), so that nobody could tell its "
            f"stored answers from another version's: put it into a .py file and import it"
        ) from error
    libraries = sorted({library for one in methods for library in one.needs.libraries})
    return "-".join([code, *(f"{library}-{version(library)}" for library in libraries)])
