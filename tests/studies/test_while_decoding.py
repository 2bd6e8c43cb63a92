"""The study of caches that compress while they answer, on a tiny model."""

from __future__ import annotations

import json

import pytest

from kvgauge.errors import UserError
from pipelines.studies import while_decoding


def test_every_cell_keeps_to_its_budget_and_takes_its_turn(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"model": "tiny/llama", "context": 128, "answer": 66, "every": 64, "part": 8, "calibration": 1}
    while_decoding.main([part for name, value in options.items() for part in (f"--{name}", str(value))])
    said = capsys.readouterr()
    found = json.loads(said.out.splitlines()[-1])
    assert {name: found[name] for name in options} == options
    full, *cells = found["cells"]
    assert full["cell"] == "full" and full["same_token"] == 1.0 and full["tpot_end_over_full"] == 1.0
    assert [row["cell"] for row in cells][:2] == ["xkv@0.5~64", "xkv@0.25~64"] and len(cells) == 9
    assert "int3@0.25~64 is left out" in said.err  # heads of 16 have too many scales
    for row in cells:
        assert row["multiples"] == [192] and 0.5 < row["over_budget"] <= 1.02
        assert row["at_last_multiple"] == row["over_budget"]
        assert row["end_bytes_ratio"] <= row["peak_bytes_ratio"]
        assert 0 <= row["same_token"] <= 1 and 0 < row["compression_share"] < 1
        assert row["tpot_start_ms"] > 0 and row["tpot_end_over_full"] > 0


@pytest.mark.parametrize(("argument", "message"), [("--every", "below 1|or more"), ("--answer", "or more")])
def test_numbers_below_one_are_refused(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        while_decoding.main(["--model", "tiny/llama", argument, "0"])
