"""The cost command, and the published two passes it is compared with."""

from __future__ import annotations

import json

import pytest
import torch

import kvgauge
from kvgauge.evaluation.decoding import prefill
from pipelines.studies import merging_cost
from pipelines.studies.two_pass import TwoPassCache


def test_two_passes_give_the_models_logits_while_nothing_merges() -> None:
    model = kvgauge.load_model("tiny/llama")[0]
    ids = torch.randint(3, 300, (1, 100))
    cache = merging_cost.cache_of("two_pass", model, 100, 101, 32)
    assert isinstance(cache, TwoPassCache)
    with torch.no_grad():
        torch.testing.assert_close(prefill(model, ids, cache), model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_two_passes_merge_before_the_window_is_appended() -> None:
    model = kvgauge.load_model("tiny/llama")[0]
    ids = torch.randint(3, 300, (1, 5 * 32))
    cache = merging_cost.cache_of("two_pass", model, 160, 64, 32)
    prefill(model, ids, cache)
    assert cache.get_seq_length() == 160
    assert isinstance(cache, TwoPassCache)
    assert [cache.physical_length(layer) for layer in range(4)] == [64 + 32] * 4
    assert all(count > 0 for count in cache.merge_counts)


OPTIONS = ["--model", "tiny/llama", "--tokens", "150", "--long", "0", "--max-entries", "64", "--window", "32"]


def test_the_last_line_is_json_with_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    merging_cost.main([*OPTIONS, "--repeats", "1", "--no-peaks", "--threads", str(threads)])
    measured = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(measured["seconds"]) == set(merging_cost.WAYS)
    assert all(seconds > 0 for seconds in measured["seconds"].values())
    assert measured["kvslimmer_time_over_asymkv"] == pytest.approx(
        measured["seconds"]["kvslimmer"] / measured["seconds"]["asymkv"]
    )


def test_the_peak_of_one_way_is_measured_after_loading(capsys: pytest.CaptureFixture[str]) -> None:
    merging_cost.main([*OPTIONS, "--peak-of", "kvslimmer", "--threads", str(torch.get_num_threads())])
    measured = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert measured["peak_bytes"] >= measured["before_bytes"] > 0
