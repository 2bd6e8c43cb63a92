"""Log-probabilities of choices as an answer's text: what stands in the store where nothing was generated."""

from __future__ import annotations

import json
from collections.abc import Sequence

Likelihood = tuple[float, bool]  # the log-probability of a text, and whether the model would have said it greedily


def as_text(likelihoods: Sequence[Likelihood]) -> str:
    """The answer of a sample with choices."""
    return json.dumps([[value, greedy] for value, greedy in likelihoods])


def of_text(answer: str) -> list[Likelihood]:
    """What `as_text` wrote, to the bit."""
    return [(float(value), bool(greedy)) for value, greedy in json.loads(answer)]
