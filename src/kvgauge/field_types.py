"""Values against the types that a configuration declares: one line where they do not agree.

pydantic decides, strictly: neither 2.5 nor "2" is a whole number, and a text is no list. What would be right is said
here, in words and with an example where a small change makes the value fit.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Annotated, Any, Literal, Union

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from kvgauge.errors import UserError, unknown

# One of them, and several.
_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false each"),
    str: ("text", "texts"),
    type(None): ("null", "nulls"),
}
_LISTS = (list, tuple, Sequence, set, frozenset)


def check_fields(cls: type, values: Mapping[str, Any], where: str = "") -> None:
    """Refuse values that are not of the types of the fields of a dataclass.

    Args:
        cls: the dataclass.
        values: of some of its fields.
        where: what the dataclass is called in the configuration: it stands in front of a field's name.

    Raises:
        UserError: a value of another type; the line says which, and what would be right.
    """
    hints = field_types(cls)
    for name, value in values.items():
        if name in hints:
            check(value, hints[name], f"{where}.{name}" if where else name)


@cache
def field_types(cls: type) -> dict[str, Any]:
    """The annotations of a class; none where they name what only type checkers import."""
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except NameError:
        return {}


def check(value: Any, wanted: Any, where: str) -> None:
    """Refuse a value that is not of a type.

    Args:
        value: as it stands in a configuration.
        wanted: a type as annotations have it, e.g. ``Sequence[int] | None``. ``Annotated[str, "a name", "names"]`` says
            what to call one and several of it.
        where: the value's name.

    Raises:
        UserError: it is not.
    """
    if _fits(value, wanted):
        return
    words = [choice for option in _options(wanted) for choice in _choices(option)]
    if words and isinstance(value, str):
        raise unknown(where, value, words)
    for part, of, place in _parts(value, wanted, where):
        check(part, of, place)
    example = _example(value, wanted)
    hint = "" if example is None else f", e.g. {where}={example}"
    raise UserError(f"{where} is {_shown(value)}: it has to be {_words(wanted)}{hint}")


def _fits(value: Any, wanted: Any) -> bool:
    adapter = _adapter(wanted)
    if adapter is None:
        return True
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = None  # Python's own, from a call
    try:
        if text is None:
            adapter.validate_python(value, strict=True)
        else:
            adapter.validate_json(text, strict=True)  # whose one kind of list is every kind of Python's
    except ValidationError:
        return False
    return True


@cache
def _adapter(wanted: Any) -> TypeAdapter[Any] | None:
    """What decides about a type; None about a type that pydantic does not know."""
    try:
        return TypeAdapter(wanted, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:
        return None


def _options(wanted: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return typing.get_args(wanted) if typing.get_origin(wanted) in (Union, types.UnionType) else (wanted,)


def _choices(wanted: Any) -> tuple[str, ...]:
    return typing.get_args(wanted) if typing.get_origin(wanted) is Literal else ()


def _parts(value: Any, wanted: Any, where: str) -> list[tuple[Any, Any, str]]:
    """The parts of a value with their types and names, where its own shape is the right one."""
    for option in _options(wanted):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin in _LISTS and arguments and isinstance(value, (list, tuple)):
            return [(part, arguments[0], f"{where}[{index}]") for index, part in enumerate(value)]
        if origin in (dict, Mapping) and arguments and isinstance(value, Mapping):
            return [(part, arguments[1], f"{where}.{key}") for key, part in value.items()]
    return []


def _words(wanted: Any, several: bool = False) -> str:
    """A type in words."""
    options = _options(wanted)
    if len(options) > 1:
        return " or ".join(_words(option, several) for option in options)
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Annotated:
        named = [word for word in arguments[1:] if isinstance(word, str)]
        return named[several] if len(named) > 1 else _words(arguments[0], several)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in _LISTS or wanted in _LISTS:
        of = f" of {_words(arguments[0], True)}" if arguments and arguments[0] is not Any else ""
        return f"{'lists' if several else 'a list'}{of}"
    if origin in (dict, Mapping) or wanted in (dict, Mapping):
        return "mappings {key: value}" if several else "a mapping {key: value}"
    return _WORDS[wanted][several] if wanted in _WORDS else getattr(wanted, "__name__", str(wanted))


def _example(value: Any, wanted: Any) -> str | None:
    """The nearest right value as a command line has it; None where there is none to be guessed."""
    candidates: list[Any] = [[value], *(value if isinstance(value, (list, tuple)) and len(value) == 1 else ())]
    if isinstance(value, float) and value.is_integer():
        candidates += [int(value), [int(value)]]
    if isinstance(value, str):
        with suppress(ValueError):
            candidates += [json.loads(value), [json.loads(value)]]
    fitting = (candidate for candidate in candidates if _fits(candidate, wanted))
    return next((_shown(candidate, (",", ":")).replace('"', "") for candidate in fitting), None)


def _shown(value: Any, separators: tuple[str, str] = (", ", ": ")) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, separators=separators)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
