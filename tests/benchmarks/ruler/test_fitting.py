from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from kvgauge.benchmarks.ruler.fitting import largest_fit


@given(
    steps=st.lists(st.integers(0, 90), min_size=1, max_size=400),
    base=st.integers(1, 500),
    budget=st.integers(1, 20_000),
    slack=st.integers(0, 30),
)
def test_it_finds_a_size_that_fits_and_cannot_grow(steps, base, budget, slack):
    tokens = list(accumulate(steps, initial=base))
    if tokens[0] > budget:
        tokens = [min(budget, value) for value in tokens[:1]] + tokens[1:]
    size, found = largest_fit(tokens.__getitem__, 0, tokens[0], len(tokens) - 1, budget, slack)
    assert found == tokens[size] <= budget
    assert size == len(tokens) - 1 or tokens[size + 1] > budget or budget - found <= slack


@given(slope=st.integers(1, 100), base=st.integers(0, 300), budget=st.integers(500, 200_000))
def test_linear_growth_takes_few_measurements(slope, base, budget):
    measured = []

    def measure(size: int) -> int:
        measured.append(size)
        return base + slope * size

    size, found = largest_fit(measure, 0, base, 10**7, budget, slack=0)
    assert found <= budget < found + slope
    assert size * slope + base == found
    assert len(measured) <= 4


def test_all_there_is_may_be_too_little():
    assert largest_fit(lambda size: 10 + size, 1, 11, 40, 1000, slack=0) == (40, 50)


def test_rough_growth_ends():
    # token counts that jump up and down around a line, as tokenizers' merges make them
    def measure(size: int) -> int:
        return 7 * size + (size * 7919) % 13

    size, found = largest_fit(measure, 0, 0, 10**6, 5000, slack=0)
    assert found == measure(size) <= 5000 < measure(size + 1)
