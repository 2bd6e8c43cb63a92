"""The report stage on finished artifacts: what it prints, and what its page says it is made from."""

from __future__ import annotations

import json
from pathlib import Path

from hydra import compose, initialize_config_dir

from kvgauge import artifacts
from kvgauge.configuration import CONF_DIR
from pipelines.report import run

TIMING = {"cell": "full", "method": "full", "budget": None, "batch": 1, "context_length": 64, "ttft_s": 1.0}
TIMING |= {"tpot_median_s": 0.1, "tpot_p95_s": 0.1, "tokens_per_s": 10.0, "nbytes": 1, "peak_bytes": 1}
TIMING |= {"tpot_over_static": 1.0, "tpot_over_dynamic": 1.0, "ttft_over_static": 1.0}


def test_it_prints_the_page_s_size_and_its_path(tmp_path: Path, capsys) -> None:
    timed = tmp_path / "latency" / "mine"
    artifacts.begin(timed)
    artifacts.write_json(timed / "latency.json", [TIMING])
    artifacts.finish(timed, "latency", {"seed": 1})
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        run(compose("config", overrides=[f"artifacts={tmp_path}", "out=page"]))
    page = tmp_path / "report" / "page" / "index.html"
    size, path = capsys.readouterr().out.splitlines()
    assert path == str(page)
    assert size == f"a page of {page.stat().st_size / 1000:,.0f} kB, which asks no network"
    known = json.loads((timed / "meta.json").read_text())["fingerprint"]
    assert f"&#34;mine&#34;: &#34;{known}&#34;" in page.read_text()
