"""The parts of a decode step."""

from __future__ import annotations

import sys

import pytest
import torch

from pipelines.studies import decode_profile
from pipelines.studies.decode_profile import OTHERS, OUTSIDE, PARTS, part_of, step_profile


def test_parts_add_up_to_the_step():
    a, b = torch.randn(200, 200), torch.randn(4, 50, 50)
    parts = step_profile(lambda: (torch.mm(a, a), torch.bmm(b, b), torch.softmax(a, -1), a.exp()), steps=3)
    assert set(parts) == {"step", *PARTS, OTHERS, OUTSIDE}
    assert sum(value for name, value in parts.items() if name != "step") == pytest.approx(parts["step"])
    assert all(parts[name] > 0 for name in ("linear", "attention products", "softmax", OTHERS))
    assert parts["copies"] == 0


@pytest.mark.parametrize("method", ["dynamic", "full", "single_svd"])
def test_operators_of_real_steps_are_recognised(method, monkeypatch, capsys):
    """Attention over any cache is seen as attention, and the linear layers as linear layers."""
    arguments = ["--model", "tiny/llama", "--methods", method, "--batch", "2", "--tokens", "40", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["decode_profile", *arguments])
    decode_profile.main()
    out = capsys.readouterr().out
    assert '"linear": 0.0,' not in out and '"attention products": 0.0,' not in out


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--methods", "kqsvd"], "--projections kqsvd=FILE"),
        (["--methods", "kqsdv"], "did you mean"),
        (["--methods", "single_svd", "--budget", "2"], "budget"),
    ],
)
def test_mistakes_end_in_one_line(arguments, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decode_profile", "--model", "tiny/llama", "--tokens", "16", *arguments])
    with pytest.raises(SystemExit) as end:
        decode_profile.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and reason in error and error.count("\n") == 1


def test_unknown_operators_are_others():
    assert part_of("aten::silu") == OTHERS and part_of("aten::bmm") == "attention products"
