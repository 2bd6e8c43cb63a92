"""The largest haystack that fits a number of tokens, in few measurements."""

from __future__ import annotations

from collections.abc import Callable

_FIRST_STEP = 16
_SECANT_STEPS = 10


def largest_fit(
    measure: Callable[[int], int], smallest: int, smallest_tokens: int, largest: int, budget: int, slack: int
) -> tuple[int, int]:
    """A size whose tokens fit `budget` while one unit more does not, or whose tokens come within `slack` of it.

    Tokens grow almost linearly with the size, so secant steps land next to the answer; bisection takes over where
    they do not. Every step narrows an interval of whole numbers, so the search always ends.

    Args:
        measure: size to tokens, nearly monotone.
        smallest: a size that fits.
        smallest_tokens: its tokens.
        largest: the greatest size allowed, not measured unless the search arrives there.
        budget: tokens allowed.
        slack: tokens that may stay unused.

    Returns:
        The size and its tokens.
    """
    fits, fits_tokens = smallest, smallest_tokens
    fails = largest + 1
    fails_tokens: int | None = None
    before = None  # an earlier size that fits, to extrapolate from until one is found that does not
    steps = 0
    while fails - fits > 1 and budget - fits_tokens > slack:
        steps += 1
        if steps > _SECANT_STEPS:
            guess = (fits + fails) // 2
        elif fails_tokens is not None:
            guess = fits + (budget - fits_tokens) * (fails - fits) // (fails_tokens - fits_tokens)
        elif before is None:
            guess = fits + _FIRST_STEP
        else:
            gained = max(fits_tokens - before[1], 1)
            guess = fits + (budget - fits_tokens) * (fits - before[0]) // gained
        guess = min(max(guess, fits + 1), fails - 1)
        tokens = measure(guess)
        if tokens <= budget:
            before = (fits, fits_tokens)
            fits, fits_tokens = guess, tokens
        else:
            fails, fails_tokens = guess, tokens
    return fits, fits_tokens
