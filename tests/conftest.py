"""What tests share: models, moments and fits, made once a process; and what a process of several needs."""

from __future__ import annotations

import gc
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache

# rouge-score's logging keeps the stream that it finds when imported, and closes it when Hydra sets logging up.
with redirect_stderr(sys.__stderr__):
    import absl.logging  # noqa: F401

import pytest
import torch
from transformers import PreTrainedModel

import kvgauge
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import learns
from kvgauge.contract.method import Method
from kvgauge.kernels.cpu.library import library
from kvgauge.models.attaching import attach
from kvgauge.models.zoo import zoo_model


def pytest_configure() -> None:
    """Builds the compiled kernels before several processes would, or a test whose cache directory is its own."""
    library()


_frozen_modules = 0


def pytest_runtest_setup() -> None:
    """Takes what has been imported out of garbage collection: a test that collects need not walk all of torch."""
    global _frozen_modules
    if len(sys.modules) > _frozen_modules + 50:
        gc.collect()
        gc.freeze()
        _frozen_modules = len(sys.modules)


@cache
def _model(name: str) -> PreTrainedModel:
    return kvgauge.load_model(name)[0]


@cache
def _zoo(name: str) -> PreTrainedModel:
    return zoo_model(name)


@cache
def _attached(name: str) -> PreTrainedModel:
    model = zoo_model(name)
    attach(model)
    return model


@cache
def _moments(name: str) -> kvgauge.Moments:
    return kvgauge.collect(_model(name), [random_tokens(4, 160, seed=1)], held_out=random_tokens(2, 160, seed=11))


def random_tokens(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (batch, tokens), generator=generator)


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], PreTrainedModel]:
    """A tiny model by name, e.g. ``tiny("tiny/llama")``; do not change its weights."""
    return _model


@pytest.fixture(scope="session")
def zoo() -> Callable[[str], PreTrainedModel]:
    """A model of `kvgauge.models.zoo.ARCHITECTURES` as transformers runs it; do not change its weights."""
    return _zoo


@pytest.fixture(scope="session")
def attached() -> Callable[[str], PreTrainedModel]:
    """The same with kvgauge's attention."""
    return _attached


@pytest.fixture(scope="session")
def moments() -> Callable[[str], kvgauge.Moments]:
    """The moments of a tiny model by its name."""
    return _moments


@pytest.fixture(scope="session")
def fit() -> Callable[[Method, str], Fitted | None]:
    """What a method learns on a tiny model; None where it learns nothing."""

    def fitted(method: Method, name: str) -> Fitted | None:
        return method.fit(_moments(name), _model(name)) if learns(method) else None

    return fitted


@pytest.fixture(scope="session")
def tokens() -> Callable[..., torch.Tensor]:
    """Seeded random tokens (batch, tokens)."""
    return random_tokens
