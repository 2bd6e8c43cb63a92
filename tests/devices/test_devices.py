"""Every method on one simulated GPU and on two: the CPU's answers, one wait a step, launches as the table says."""

from __future__ import annotations

import pytest

import kvgauge
from kvgauge.errors import UserError
from kvgauge.simulation.running import run_on_cpu
from kvgauge.testing import check_run
from tests.devices.cases import CASES, LOOSE
from tests.devices.launches import MODEL, PLACEMENTS, measured, prepared, read, run


@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_cpus(case):
    method, fitted = prepared(case)
    table, model = read(), kvgauge.load_model(MODEL)[0]
    for padded in (False, True):
        placements = [name for name, (_, has_padding) in PLACEMENTS.items() if has_padding is padded]
        try:
            expected = run_on_cpu(method, model, fitted, padded=padded)
        except UserError as refusal:
            for placement in placements:
                with pytest.raises(UserError, match=str(refusal).partition(":")[0]):
                    run(case, placement)
            continue
        for placement in placements:
            found = run(case, placement)
            check_run(f"{case} ({placement})", found, expected, close=LOOSE.get(case, 1e-3))
            for name, value in measured(found).items():
                assert value <= table[case, placement][name] + 1e-9, (
                    f"{name} of a step of {case}, {placement}: {value:g}"
                )


def test_every_method_is_here():
    names = {name for name, _ in CASES.values()}
    missing = {name for name in kvgauge.list_methods() if not name.startswith("kvpress/")} - names
    assert not missing
