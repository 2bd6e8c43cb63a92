"""Methods by name: a YAML of `conf/method/`, what an installed package registers, or the path of a class.

A package of its own offers methods in either of three ways: by the path of a class (``package.module.Class``), by a
directory of configurations (``--config-dir``), and by the entry point group ``kvgauge.methods``::

    [project.entry-points."kvgauge.methods"]
    mine = "package.module:Class"
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kvgauge import configuration
from kvgauge.contract.method import Method
from kvgauge.errors import UserError, unknown

GROUP = "kvgauge.methods"


def list_methods(folder: str = "") -> list[str]:
    """Every method by name: kvgauge's own and registered ones, or those of a folder of ``conf/method/``: kvpress."""
    known = {*configuration.names("method"), *registered()}
    return sorted(name for name in known if name.rpartition("/")[0] == folder)


def build_method(name: str | Method, /, **overrides: Any) -> Method:
    """A method with the given fields replaced.

    Args:
        name: of ``conf/method/<name>.yaml``, of an entry point, the path of a class (``package.module.Class``), or a
            method as it is.
        overrides: fields that replace those of the configuration.

    Raises:
        UserError: an unknown name or field, two methods of one name, a class that is no method or cannot be imported,
            or a value that the method refuses.
    """
    if isinstance(name, Method):
        values = {field.name: getattr(name, field.name) for field in fields(name)}
        own = {"_target_": configuration.path_of(name)}
        return as_method(configuration.build(own | values, "method", **overrides))
    return as_method(configuration.build(node(name), "method", **overrides))


def node(name: str) -> dict[str, Any]:
    """The configuration that a name stands for, its ``_target_`` among the fields.

    Raises:
        UserError: as `build_method`.
    """
    own, others = configuration.names("method"), registered().get(name, ())
    owners = [*(["kvgauge"] if name in own else []), *(_package(one) for one in others)]
    if len(owners) > 1:
        raise UserError(
            f"two methods are called {name!r}: that of {owners[0]} stands, and {owners[1]} loses: "
            f"uninstall {owners[1]} or register its method under another name"
        )
    if others:
        return {"_target_": others[0].value.replace(":", ".")}
    if name in own:
        return configuration.read("method", name)
    if "." in name and "/" not in name:
        return {"_target_": name}
    raise unknown("method", name, {*own, *registered()})


def as_method(built: object) -> Method:
    """`built`, if it is a method.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(built, Method):
        raise UserError(
            f"{configuration.path_of(built)} is no method: it has to be a subclass of kvgauge.Method, "
            f"see docs/adding-a-method.md"
        )
    return built


@cache
def registered() -> dict[str, tuple[EntryPoint, ...]]:
    """The entry points of every name, in the order of their packages' names."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in sorted(entry_points(group=GROUP), key=_package):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value.partition(":")[0]
