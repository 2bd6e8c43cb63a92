"""The library that draws the interactive figures, as text to be embedded in a page."""

from __future__ import annotations

import contextlib
import functools
from importlib.metadata import version
from pathlib import Path

import vl_convert

from kvgauge.artifacts import replacing
from kvgauge.configuration import digest
from kvgauge.errors import UserError
from kvgauge.user_cache import cache_root

SNIPPET = "window.vegaEmbed = vegaEmbed;"


@functools.cache
def vega_script() -> str:
    """Vega and Vega-Embed (University of Washington Interactive Data Lab, BSD-3-Clause) as one script.

    The same text every time. It takes seconds to put together, so the user's cache keeps it, where that can be written.
    """
    made_of = {"package": version("vl-convert-python"), "snippet": SNIPPET}
    kept = cache_root() / "scripts" / f"vega-{digest(made_of)}.js"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return kept.read_text(encoding="utf-8")
    script = _embeddable(vl_convert.javascript_bundle(SNIPPET))
    with contextlib.suppress(UserError):
        _keep(kept, script)
    return script


def _embeddable(script: str) -> str:
    """Without what would end a script within a page, wherever it stands."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _keep(path: Path, text: str) -> None:
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
