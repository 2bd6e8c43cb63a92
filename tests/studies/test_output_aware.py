"""The ablation: paired with its reference, at equal bytes, and what starves is what sinks cure."""

from __future__ import annotations

import json

import pytest

import kvgauge
from kvgauge.measure.fidelity import compress_context, model_fidelity
from pipelines.studies import output_aware
from pipelines.studies.output_aware import METRICS, Cell, Prompt, divergences, paired, starved

CONTEXT = 160


@pytest.fixture(scope="module")
def measured(tiny, moments, tokens):
    model = tiny("tiny/llama")
    cells = [Cell(metric, way, 2, 0.4) for metric in METRICS for way in ("uniform", "energy", "greedy")]
    prompts = [Prompt(model, tokens(1, CONTEXT + 12, seed=seed), CONTEXT) for seed in (51, 52)]
    return cells, divergences(model, moments("tiny/llama"), prompts, cells, group_size=2)


def test_every_cell_is_paired_at_equal_bytes(measured):
    cells, results = measured
    full = kvgauge.full_nbytes(kvgauge.load_model("tiny/llama")[0], CONTEXT)
    rows = list(paired(results, full))
    assert [(row["metric"], row["allocate"]) for row in rows] == [(cell.metric, cell.allocate) for cell in cells]
    shares = [row["share_of_bytes"] for row in rows]
    assert max(shares) <= 0.4
    assert max(shares) - min(shares) < 0.01
    plain = rows[0]
    assert (plain["ratio"], plain["better_on"], plain["sign_test"]) == (1.0, 0, 1.0)
    for row in rows:
        ratios = [mine / theirs for mine, theirs in zip(row["kl_per_prompt"], plain["kl_per_prompt"], strict=True)]
        assert row["ratio"] == pytest.approx((ratios[0] * ratios[1]) ** 0.5)
        assert row["better_on"] == sum(ratio < 1 for ratio in ratios)


def test_the_divergence_is_that_of_a_prefill_of_its_own(tiny, tokens):
    model, ids = tiny("tiny/llama"), tokens(1, CONTEXT + 12, seed=53)
    method = kvgauge.build_method("xkv", budget=0.4)
    cache = compress_context(model, method, None, ids[:, :CONTEXT])
    expected = model_fidelity(model, method, cache, ids[:, :CONTEXT], ids[:, CONTEXT:])
    kl, nbytes = Prompt(model, ids, CONTEXT).kl(model, method, None)
    assert kl == pytest.approx(expected.kl, rel=1e-3)
    assert nbytes == expected.nbytes


def test_what_starves_is_measured_layer_by_layer(tiny, tokens):
    model, ids = tiny("tiny/llama"), tokens(2, 100, seed=54)
    rows = list(starved(model, ids, 0.4, group_size=2))
    assert [(row["layer"], row["part"]) for row in rows] == [(i, part) for i in range(4) for part in ("keys", "values")]
    assert all(row["loss"] > 0 for row in rows)
    exact = list(starved(model, ids[:, :4], 0.99, group_size=2))  # four tokens are all put back
    assert all(row["loss_with_exact_sinks"] == pytest.approx(0, abs=1e-10) for row in exact)


def test_the_command_ends_in_json(capsys):
    arguments = "--model tiny/llama --tokens 96 --continuation 8 --prompts 1 --calibration 2 --group-size 2"
    output_aware.main([*arguments.split(), "--budgets", "0.5", "--metrics", "values", "--allocations", "energy"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["cells"]) == 4
    assert len(result["starved"]) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "value"], "did you mean 'values'"),
        (["--allocations", "even"], "unknown allocation"),
        (["--prompts", "0"], "at least one prompt"),
        (["--tokens", "100000"], "positions"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    with pytest.raises(SystemExit) as caught:
        output_aware.main(["--model", "tiny/llama", *arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
