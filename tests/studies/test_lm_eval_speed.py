from __future__ import annotations

from pathlib import Path

import kvgauge
from pipelines.studies.lm_eval_speed import CELLS, TASKS, fitted_cells, loops, panel, write_tasks


def test_both_ways_give_the_same_scores(tmp_path: Path) -> None:
    model, tokenizer = kvgauge.load_model("tiny/llama")
    cells = fitted_cells(model, tokenizer, sequences=1)
    assert len(cells) == len(CELLS) == 6
    write_tasks(tmp_path, documents=2, words=20)
    own_s, own = panel(model, tokenizer, cells[:2], tmp_path, batch_size=1)
    loop_s, loop = loops("tiny/llama", cells[:2], tmp_path, batch_size=1)
    assert own == loop and set(own) == {"full", "ksvd@0.5"} and set(own["full"]) == set(TASKS)
    assert own_s > 0 and loop_s > 0
