"""Values against declared types: what passes, and the line that says what would be right."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pytest

import kvgauge
import kvgauge.methods
from kvgauge import configuration
from kvgauge.errors import UserError
from kvgauge.field_types import _adapter, check, check_fields, field_types

if TYPE_CHECKING:
    from nowhere import Nothing

Names = Annotated[str, "a name", "names"]


class Colour(enum.Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (3, int),
        (3, float),
        (0.5, float),
        (float("inf"), float),
        (np.float64(0.5), float),
        (None, int | None),
        ("vt", str | Sequence[str]),
        (["vt"], str | Sequence[str]),
        ([1, 2], tuple[int, ...]),
        ((1, 2), list[int]),
        ([1, "a"], tuple[int, str]),
        ([], Sequence[int]),
        ({"chunk": 16}, Mapping[str, Any]),
        ("/tmp", Path),
        ("red", Colour),
        ("context", Literal["context", "prompt"]),
        (object(), Any),
        (range(3), range),
    ],
)
def test_values_that_fit(value, wanted):
    check(value, wanted, "field")


@pytest.mark.parametrize(
    ("value", "wanted", "line"),
    [
        (0.5, Sequence[float] | None, "field is 0.5: it has to be a list of numbers or null, e.g. field=[0.5]"),
        (2.5, int, "field is 2.5: it has to be a whole number"),
        (8.0, int, "field is 8.0: it has to be a whole number, e.g. field=8"),
        ("8", int, 'field is "8": it has to be a whole number, e.g. field=8'),
        (True, int, "field is true: it has to be a whole number"),
        (True, float, "field is true: it has to be a number"),
        (0, bool, "field is 0: it has to be true or false"),
        (None, int, "field is null: it has to be a whole number"),
        (5, str, "field is 5: it has to be text"),
        ([4096.0], Sequence[int], "field[0] is 4096.0: it has to be a whole number, e.g. field[0]=4096"),
        ([1, "x"], Sequence[int] | None, 'field[1] is "x": it has to be a whole number'),
        (4096.0, Sequence[int], "field is 4096.0: it has to be a list of whole numbers, e.g. field=[4096]"),
        ("html", Sequence[Names] | None, 'field is "html": it has to be a list of names or null, e.g. field=[html]'),
        ("[0.5,0.25]", Sequence[float], 'field is "[0.5,0.25]": it has to be a list of numbers, e.g. field=[0.5,0.25]'),
        ({"a": [1.5]}, Mapping[str, Sequence[int]], "field.a[0] is 1.5: it has to be a whole number"),
        ([1], Mapping[str, Any], "field is [1]: it has to be a mapping {key: value}"),
        ("contxt", Literal["context", "prompt"], "unknown field 'contxt': did you mean 'context'? choose one of"),
        (3, Literal["context", "prompt"], "field is 3: it has to be one of context, prompt"),
        ("blue", Colour, 'field is "blue": it has to be Colour'),
        ({1, 2}, int, "field is {1, 2}: it has to be a whole number"),
    ],
)
def test_a_line_for_values_that_do_not(value, wanted, line):
    with pytest.raises(UserError) as caught:
        check(value, wanted, "field")
    assert str(caught.value).startswith(line)


@dataclasses.dataclass(frozen=True)
class Settings:
    size: int = 1
    names: Sequence[str] = ()
    later: Any = None


@dataclasses.dataclass
class Unresolved:
    size: int
    other: Nothing


def test_fields_are_called_by_their_place():
    with pytest.raises(UserError, match=r"^benchmark\.size is 2\.5"):
        check_fields(Settings, {"later": object(), "size": 2.5}, "benchmark")
    with pytest.raises(UserError, match=r"^names is 3"):
        check_fields(Settings, {"names": 3})
    check_fields(Settings, {"unknown": 1})


def test_annotations_for_type_checkers_alone_check_nothing():
    check_fields(Unresolved, {"size": "anything"})


def node(**fields):
    return {"_target_": f"{__name__}.Settings", **fields}


def test_what_is_built_is_checked(monkeypatch):
    monkeypatch.setattr(configuration, "target_class", lambda path, what: Settings)
    with pytest.raises(UserError, match=r"^thing\.size is \"two\": it has to be a whole number$"):
        configuration.build(node(size="two"), "thing")
    built = configuration.build(node(), "thing", size=np.int64(3), later=np.float32(0.5))
    assert (type(built.size), built.size, type(built.later), built.later) == (int, 3, float, 0.5)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("kqsvd", {"rank": 2.5}, "method.rank is 2.5: it has to be a whole number or null"),
        ("kqsvd", {"budget": "half"}, 'method.budget is "half": it has to be a number or null'),
        ("streaming_llm", {"window": [512]}, "method.window is [512]: it has to be a whole number"),
        ("compose", {"compose": "kqsvd"}, 'method.compose is "kqsvd": it has to be a list of'),
        (
            "kvpress/snapkv",
            {"budget": [0.5]},
            "method.budget is [0.5]: it has to be a number or null, e.g.",
        ),
    ],
)
def test_a_method_s_fields_from_python(name, fields, words):
    with pytest.raises(UserError) as caught:
        kvgauge.build_method(name, **fields)
    assert words in str(caught.value)


@pytest.mark.parametrize("group", ["model", "method", "corpus", "benchmark", "latency", "quantizer"])
def test_every_field_that_can_be_configured_is_checked(group):
    for name in configuration.names(group):
        cls = configuration.target_class(configuration.read(group, name)["_target_"], group)
        for field in dataclasses.fields(cls):
            assert _adapter(field_types(cls)[field.name]) is not None, (cls, field.name)


def test_annotations_of_every_method_can_be_read():
    for module in pkgutil.walk_packages(kvgauge.methods.__path__, "kvgauge.methods."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, kvgauge.Method) and dataclasses.is_dataclass(value):
                assert field_types(value), value
