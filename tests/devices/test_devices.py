"""Every method on one simulated GPU and on two: the CPU's answers, one wait a step, launches as the table says."""

from __future__ import annotations

import pytest

import kvgauge
from kvgauge.errors import UserError
from kvgauge.simulation.running import run_on_cpu, run_on_devices
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
                allowed, renew = table[case, placement][name], "python -m tests.devices.launches"
                message = (
                    f"{name} of a step of {case}, {placement}: {value:g} where the table has {allowed:g} ({renew})"
                )
                assert value <= allowed + 1e-9, message


def test_every_method_is_here():
    names = {name for name, _ in CASES.values()}
    missing = {name for name in kvgauge.list_methods() if not name.startswith("kvpress/")} - names
    assert not missing


@pytest.mark.parametrize("case", ["full", "kqsvd", "ksvd", "xkv", "xkv fold"])
def test_latents_of_mla(case, fit):
    name, options = CASES[case]
    method, model = kvgauge.build_method(name, **options), kvgauge.load_model("tiny/deepseek_v2")[0]
    fitted = fit(method, "tiny/deepseek_v2")
    for devices, padded in PLACEMENTS.values():
        expected = run_on_cpu(method, model, fitted, padded=padded)
        check_run(f"{case} of MLA", run_on_devices(method, model, fitted, devices, padded=padded), expected)


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3_5", "gpt_oss"])
def test_models_with_layers_of_other_kinds(architecture, attached):
    model = attached(architecture)
    for name, options in {"full": {}, "kvslimmer": {"budget": 0.7}, "xkv": {"budget": 0.7, "group_size": 2}}.items():
        method = kvgauge.build_method(name, **options)
        expected = run_on_cpu(method, model, None, padded=True)
        run = run_on_devices(method, model, None, ["cuda:0", "cuda:1"], padded=True)
        check_run(f"{name} of {architecture}", run, expected)
