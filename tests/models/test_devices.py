from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import kvgauge
from kvgauge.errors import UserError
from kvgauge.models import devices
from kvgauge.models.attaching import attach
from kvgauge.models.zoo import zoo_model


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cudaa", "unknown device 'cudaa'.*cuda"),
        ("gpu", "unknown device"),
        ("cuda:x", "unknown device"),
        ("", "unknown device"),
        ("meta", "holds no numbers"),
        ("cuda:7", "device cuda:7"),
        ("mps", "device mps does not work|use device=cpu"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA says")
def test_a_device_that_is_not_here_is_one_line(device, said):
    with pytest.raises(UserError, match=said) as refusal:
        kvgauge.load_model("tiny/llama", device=device)
    assert "\n" not in str(refusal.value)


def test_a_gpu_beyond_the_last_names_the_last(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="cuda:7: this machine has cuda:0 … cuda:1"):
        devices.check_device(torch.device("cuda:7"), torch.float32)


def test_a_dtype_that_the_device_lacks_is_one_line(monkeypatch):
    def ones(*shape, dtype, device):
        raise TypeError(f"Cannot convert a tensor to the device as it doesn't support {dtype}.\nMore lines.")

    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(UserError, match="cpu does not compute in float64") as refusal:
        devices.check_device(torch.device("cpu"), torch.float64)
    assert "\n" not in str(refusal.value)


def test_a_model_that_does_not_fit_is_one_line(tiny):
    class Small(torch.nn.Linear):
        def to(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nAnd more.")

    with pytest.raises(UserError, match=r"model tiny: weights of 0\.0 GiB do not fit on cuda:0") as refusal:
        devices.moved(Small(3, 3), torch.device("cuda:0"), "tiny")
    assert "\n" not in str(refusal.value)


def test_an_unknown_spread_is_one_line():
    with pytest.raises(UserError, match=r"unknown device_map 'autoo'.*auto"):
        kvgauge.load_model("tiny/llama", device_map="autoo")


@pytest.mark.parametrize("how", ["size", "weights"])
def test_tensor_parallel_models_are_refused(how):
    model = zoo_model("llama")
    if how == "size":
        model._tp_size = 2
    else:
        model.lm_head.weight.device_mesh = SimpleNamespace()
    with pytest.raises(UserError, match="tensor-parallel") as refusal:
        attach(model)
    assert "\n" not in str(refusal.value)


def test_the_command_ends_with_2():
    command = [sys.executable, "-m", "kvgauge", "collect", "model=tiny/llama", "model.device=cudaa"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("kvgauge: ") and "Traceback" not in done.stderr


def test_a_full_device_ends_a_stage_with_2(tmp_path):
    (tmp_path / "full_device.py").write_text(
        "import torch\nfrom kvgauge.stage import stage\n"
        "def run(cfg):\n    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB.\\nAnd more.')\n"
        "if __name__ == '__main__':\n    stage(run)()\n"
    )
    command = [sys.executable, str(tmp_path / "full_device.py"), "model=tiny/llama"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert "the device is full (CUDA out of memory. Tried to allocate 20 GiB.)" in done.stderr
    assert "Traceback" not in done.stderr
