"""Tiny models of many architectures, each made once a session, as transformers itself runs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from transformers import PreTrainedModel

from kvgauge.models.zoo import zoo_model


@cache
def _zoo(name: str) -> PreTrainedModel:
    return zoo_model(name)


@pytest.fixture(scope="session")
def zoo() -> Callable[[str], PreTrainedModel]:
    """A model of `kvgauge.models.zoo.ARCHITECTURES`; do not change its weights."""
    return _zoo
