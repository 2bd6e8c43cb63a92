"""The compiled kernels: built once per machine with its own C++ compiler, loaded through ctypes.

The library is named by a hash of its source, its options and the processor, and appears whole or not at all, also when
two processes build it at once. Without a compiler there is none: callers then take torch's batched products.
``KVGAUGE_NATIVE=0`` does without it on purpose.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

from kvgauge.user_cache import cache_root

# With what they want beside `COMPILE`.
SOURCES = {Path(__file__).with_name("kernels.cpp"): (), Path(__file__).with_name("stored.cpp"): ("-O2",)}
COMPILED_SOURCES = (*SOURCES, *sorted(Path(__file__).parent.glob("*.h")))

# -ffast-math lets sums be reordered and exponentials be vectors. It may not reach the linker: there it would switch the
# whole process to flushing denormal numbers.
COMPILE = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-std=c++17", "-c")
LINK = ("-shared", "-fopenmp")

BUILD_SECONDS = 600


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, built if they are not there yet; None where they cannot be built or are not wanted."""
    if os.environ.get("KVGAUGE_NATIVE", "1") == "0":
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    path = cache_root() / "native" / f"kernels-{_identity(compiler)}.so"
    try:
        if not path.is_file():
            _build(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        lines = [line for line in (getattr(error, "stderr", None) or str(error)).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        warnings.warn(f"running without compiled kernels: {compiler}: {reason}", stacklevel=2)
        return None


@torch.compiler.assume_constant_result
def available() -> bool:
    """There are compiled kernels. `torch.compile` takes the answer as it was when it traced."""
    return library() is not None


def _identity(compiler: str) -> str:
    sources = [path.read_text() for path in COMPILED_SOURCES]
    options = [option for own in SOURCES.values() for option in own]
    known = [*sources, *COMPILE, *options, *LINK, compiler, platform.machine(), _processor()]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on; a cache directory may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _build(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        linked = Path(scratch, "kernels.so")
        objects = {source: str(Path(scratch, source.stem + ".o")) for source in SOURCES}
        commands = [[compiler, *COMPILE, *SOURCES[source], str(source), "-o", path] for source, path in objects.items()]
        commands.append([compiler, *LINK, *objects.values(), "-o", str(linked), "-lm"])
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        linked.replace(path)
