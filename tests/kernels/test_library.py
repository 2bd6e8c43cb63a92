"""Building the kernels: once, whole or not at all, and never a reason to fail."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvgauge.kernels.cpu import library as module
from kvgauge.kernels.cpu.counting_softmax import counting_softmax
from kvgauge.kernels.cpu.decode_attention import decode_attention
from kvgauge.kernels.cpu.library import library
from kvgauge.kernels.cpu.narrow_product import narrow_product
from kvgauge.kernels.cpu.stored_attention import StoredRun, stored_attention
from kvgauge.store.quantized_rows import ChannelQuantizedRows, TokenQuantizedRows


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Nothing built yet, nothing remembered."""
    monkeypatch.setenv("KVGAUGE_CACHE", str(tmp_path))
    library.cache_clear()
    yield
    monkeypatch.undo()
    library.cache_clear()
    library()


@pytest.fixture(scope="module")
def narrower(tmp_path_factory):
    """Where the builds of other instruction sets are, each made once."""
    return tmp_path_factory.mktemp("narrower")


def built(root: Path) -> list[Path]:
    return sorted((root / "native").iterdir()) if (root / "native").is_dir() else []


def test_it_is_built_once(tmp_path, monkeypatch):
    assert library() is not None
    [path] = built(tmp_path)
    assert path.suffix == ".so"
    library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)  # a second build would fail
    assert library() is not None


def test_it_can_be_done_without(tmp_path, monkeypatch):
    monkeypatch.setenv("KVGAUGE_NATIVE", "0")
    assert library() is None and not built(tmp_path)


def test_a_compiler_that_fails_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.warns(UserWarning, match="running without compiled kernels"):
        assert library() is None
    assert not built(tmp_path)


def test_no_compiler_is_no_error(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library() is None
    assert not built(tmp_path)


def test_loading_it_leaves_denormal_numbers_alone(monkeypatch):
    monkeypatch.undo()  # no build of its own
    assert library() is not None
    smallest, small = float("5e-324"), float("1e-310")  # not constants that the compiler folds before they are loaded
    assert smallest * 1.0 > 0 and small / 10 > 0


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the instruction sets of one family")
@pytest.mark.parametrize("instructions", ["-march=x86-64", "-march=haswell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_vectors_give_the_same_numbers(instructions, dtype, monkeypatch, narrower):
    if instructions == "-march=haswell" and "avx2" not in module._processor():
        pytest.skip("this processor has no AVX2")
    monkeypatch.setenv("KVGAUGE_CACHE", str(narrower))
    monkeypatch.setattr(module, "COMPILE", (*module.COMPILE, instructions))
    torch.manual_seed(0)
    rows, weight = torch.randn(8, 50).to(dtype), torch.randn(70, 50).to(dtype)
    query, keys, values = torch.randn(2, 3, 3, 20), torch.randn(2, 3, 20, 90).mT, torch.randn(2, 3, 20, 90).mT
    product = narrow_product(rows, weight)
    attended = decode_attention(query.to(dtype), keys.to(dtype), values.to(dtype), 0.2)
    assert product is not None and attended is not None
    close = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(product.double(), rows.double() @ weight.double().T, rtol=close, atol=close)
    scores = query.to(dtype).double() @ keys.to(dtype).double().mT * 0.2
    expected = scores.softmax(dim=-1) @ values.to(dtype).double()
    torch.testing.assert_close(attended[0].double(), expected, rtol=close, atol=close)
    for bits in (8, 4, 3, 2):
        stored = ChannelQuantizedRows(bits, 32), TokenQuantizedRows(bits, 8, balance=True)
        for buffer, rows in zip(stored, (keys, values), strict=True):
            buffer.set(rows.to(dtype))
        packed = stored_attention(query.to(dtype), [StoredRun(*(rows.compiled() for rows in stored))], 20, 0.2)
        scores = query.to(dtype).double() @ stored[0].dense().double().mT * 0.2
        torch.testing.assert_close(
            packed[0].double(), scores.softmax(dim=-1) @ stored[1].dense().double(), rtol=close, atol=close
        )
    block, sums = torch.randn(2, 3, 3, 90).to(dtype), torch.zeros(2, 3, 90)
    weights = block.double().softmax(dim=-1)
    assert counting_softmax(block, sums, None, None, 1)
    torch.testing.assert_close(block.double(), weights, rtol=close, atol=close)
    torch.testing.assert_close(sums.double(), weights.sum(dim=2), rtol=1e-5, atol=1e-5)
