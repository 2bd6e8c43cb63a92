"""Writes ``conf/method/kvpress/``: one file per press of the installed kvpress, with the press's own parameters.

``python -m kvgauge.methods.pressed.kvpress_conf`` after kvpress was upgraded.
"""

from __future__ import annotations

from typing import Any

import yaml

from kvgauge.configuration import CONF_DIR
from kvgauge.methods.pressed.kvpress import GROUP, MASKING, REFUSED, WHILE_DECODING, defaults, method_class
from kvgauge.methods.pressed.kvpress_library import presses

FOLDER = CONF_DIR / "method" / "kvpress"


def names() -> list[str]:
    """The presses that a context can be compressed with."""
    return [name for name, cls in presses().items() if not any(base.__name__ in REFUSED for base in cls.__mro__)]


def text(name: str) -> str:
    """The content of the file of a press."""
    cls = presses()[name]
    bases = {base.__name__ for base in cls.__mro__}
    size: dict[str, Any] = {"budget": 0.5, "compression_ratio": None}
    if not _takes_a_ratio(cls):
        size = {"budget": None, "compression_ratio": None}
    elif bases & set(MASKING):
        size = {"budget": None, "compression_ratio": 0.5}
    node = {
        "_target_": f"kvgauge.methods.pressed.kvpress.{cls.__name__}",
        "name": GROUP + name,
        **size,
        **({"while_decoding": None} if cls.__name__ in WHILE_DECODING else {}),
        **defaults(cls),
    }
    body = yaml.safe_dump(node, sort_keys=False, allow_unicode=True, width=120)
    return (
        f"# {cls.__name__} of kvpress with its own parameters; written by kvgauge.methods.pressed.kvpress_conf.\n{body}"
    )


def _takes_a_ratio(cls: type[Any]) -> bool:
    press = method_class(_name(cls))(budget=1.0).new_press()
    try:
        press.compression_ratio = 0.5
    except AttributeError:
        return False
    return cls.__name__ != "ComposedPress"  # it has the attribute, and its presses have the ratios


def _name(cls: type[Any]) -> str:
    return next(name for name, one in presses().items() if one is cls)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.yaml"):
        path.unlink()
    for name in names():
        (FOLDER / f"{name}.yaml").write_text(text(name), encoding="utf-8")


if __name__ == "__main__":
    main()
