"""Which code a computation reaches: its modules by static imports, hashed with the sources that they compile.

An answer that is stored is valid as long as the code that made it is the same. What that code is, a program finds out:
from the modules named, along every ``import`` in them, at the top or inside a function, as far as it stays inside the
packages that they belong to. Imports for type checkers alone do not count, and neither does the root of a package: its
``__init__`` offers everything to users, and would tie everything to everything.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

COMPILED = ("*.cpp", "*.h", "*.cu", "*.j2")  # sources of another language: part of every module beside them


def code_version(*names: str) -> str:
    """A hash of the sources of the modules `names` and of all that they reach.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    value = hashlib.sha256()
    for name in sorted(reached(*names)):
        for path in sources(name):
            value.update(f"{name}/{path.name}".encode() + b"\0" + _content(path))
    return value.hexdigest()[:16]


def sources(name: str) -> list[Path]:
    """The source of a module, and those that it compiles."""
    path = module_file(name)
    assert path is not None
    return [path, *sorted(beside for pattern in COMPILED for beside in path.parent.glob(pattern))]


def reached(*names: str) -> set[str]:
    """The modules `names` and all modules of their packages that they import, directly or not.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    pending, seen = list(names), set[str]()
    roots = {name.partition(".")[0] for name in names} | {__package__}
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        if module_file(name) is None:
            raise ModuleNotFoundError(f"no source of a module {name!r}", name=name)
        seen.add(name)
        pending += (found for found in imports(name) if found.partition(".")[0] in roots)
    return seen


@cache
def imports(name: str) -> frozenset[str]:
    """The modules that a module names in its import statements, and the packages that it is inside; no package's root.

    Modules without a source, and those that are not installed, are left out.
    """
    path = module_file(name)
    assert path is not None
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set(_parents(name))
    for module, attributes in _statements(ast.parse(path.read_bytes()), package):
        found.update({module, *_parents(module)})
        found.update(f"{module}.{attribute}" for attribute in attributes)
    return frozenset(module for module in found if "." in module and module != name and module_file(module) is not None)


@cache
def module_file(name: str) -> Path | None:
    """The source of a module, which is not imported for it; None where there is none."""
    root, _, rest = name.partition(".")
    try:
        spec = importlib.util.find_spec(root)  # of a root: imports nothing
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    if not rest:
        return Path(spec.origin)
    if spec.submodule_search_locations is None:
        return None
    for folder in spec.submodule_search_locations:
        path = Path(folder, *rest.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def _statements(tree: ast.AST, package: str) -> Iterator[tuple[str, list[str]]]:
    """(module, names imported from it) of every import that runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _for_type_checkers(node.test):
            for other in node.orelse:
                yield from _statements(ast.Module([other], []), package)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            module = ".".join(part for part in (base if node.level else "", node.module or "") if part)
            yield module, [alias.name for alias in node.names]
        else:
            yield from _statements(node, package)


def _for_type_checkers(test: ast.expr) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "TYPE_CHECKING" for node in ast.walk(test))


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(2, len(parts))]


@cache
def _content(path: Path) -> bytes:
    return path.read_bytes()
