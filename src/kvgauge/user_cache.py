"""Where a machine keeps what is made once and used by every run: converted models, packed weights, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """``$KVGAUGE_CACHE``, else ``kvgauge`` in the user's cache directory."""
    root = os.environ.get("KVGAUGE_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvgauge"
