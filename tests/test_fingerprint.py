"""A version changes with every module that a computation reaches, and with no other."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from kvgauge import fingerprint

PACKAGE = Path(fingerprint.__file__).parent


@pytest.fixture
def touched(monkeypatch):
    """Reads a file as if something had been written behind its end."""

    def touch(*names: str) -> None:
        files = {PACKAGE / name for name in names}
        assert all(file.is_file() for file in files)
        read = Path.read_bytes
        monkeypatch.setattr(fingerprint, "_content", lambda path: read(path) + (b"# touched" if path in files else b""))

    return touch


KQSVD, XKV, KVSLIMMER = (
    f"kvgauge.methods.{name}" for name in ("per_head.kqsvd", "across_layers.xkv", "merging.kvslimmer")
)


@pytest.mark.parametrize(
    ("module", "file"),
    [
        (KQSVD, "methods/per_head/latents.py"),
        (KQSVD, "methods/per_head/factorization.py"),
        (KQSVD, "architecture/facts.py"),
        (KQSVD, "attend/attention.py"),
        (KQSVD, "kernels/cpu/kernels.cpp"),
        (KQSVD, "kernels/cpu/decode_attention.h"),
        (XKV, "methods/across_layers/group_losses.py"),
        (XKV, "methods/across_layers/subspace.py"),
        (XKV, "architecture/rotation.py"),
        (XKV, "calibration/whitening.py"),
        (KVSLIMMER, "methods/merging/merge_keys.py"),
        (KVSLIMMER, "architecture/rotary.py"),
        ("kvgauge.methods.kvquant.kvquant", "methods/kvquant/rows.py"),
        ("kvgauge.evaluation.answering", "evaluation/drafting.py"),
        ("kvgauge.evaluation.answering", "methods/exact/full.py"),
        ("kvgauge.models.attaching", "models/narrow_linear.py"),
    ],
)
def test_touching_what_is_used_makes_another_version(module, file, touched):
    before = fingerprint.code_version(module)
    touched(file)
    assert fingerprint.code_version(module) != before


@pytest.mark.parametrize("module", [KQSVD, XKV, KVSLIMMER, "kvgauge.evaluation.answering", "kvgauge.models.attaching"])
def test_touching_anything_else_does_not(module, touched):
    before = fingerprint.code_version(module)
    others = [
        "report/build.py",
        "report/plots/style.py",
        "evaluation/statistics.py",
        "measure/latency.py",
        "benchmarks/ruler/niah.py",
        "methods/pressed/kvpress.py",
        "methods/transformers_quantized/layer.py",
        "__init__.py",
    ]
    families = {"per_head": "kqsvd", "across_layers": "xkv", "merging": "kvslimmer"}
    others += [f"methods/{folder}/{name}.py" for folder, name in families.items() if folder not in module]
    touched(*others)
    assert fingerprint.code_version(module) == before


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of its own, found but never imported."""
    root = written(
        tmp_path,
        {
            "prints/__init__.py": "raise RuntimeError('imported')\nimport prints.unused\n",
            "prints/top.py": "from . import beside\nfrom .inner import part\nimport kvgauge.errors\n"
            "def later():\n    from prints.lazy import late\n",
            "prints/beside.py": "",
            "prints/inner/__init__.py": "",
            "prints/inner/part.py": "from ..beside import thing\nfrom typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    import prints.typed\nelse:\n    import prints.real\n",
            "prints/lazy.py": "late = 1\n",
            "prints/typed.py": "",
            "prints/real.py": "",
            "prints/unused.py": "",
            "prints/inner/kernel.cpp": "int main() {}\n",
        },
    )
    monkeypatch.syspath_prepend(str(root))
    yield root
    fingerprint.module_file.cache_clear()
    fingerprint.imports.cache_clear()


def test_imports_are_followed_wherever_they_stand(package):
    found = {name for name in fingerprint.reached("prints.top") if name.startswith("prints")}
    names = {"top", "beside", "inner", "inner.part", "lazy", "real"}
    assert found == {f"prints.{name}" for name in names}
    assert "kvgauge.errors" in fingerprint.reached("prints.top")
    assert "prints" not in sys.modules


def test_compiled_sources_count_with_the_modules_beside_them(package):
    names = [path.name for path in fingerprint.sources("prints.inner.part")]
    assert names == ["part.py", "kernel.cpp"]


def test_a_copy_elsewhere_has_the_same_version(package, tmp_path_factory, monkeypatch):
    before = fingerprint.code_version("prints.top")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(package / "prints", elsewhere / "prints")
    monkeypatch.syspath_prepend(str(elsewhere))
    fingerprint.module_file.cache_clear()
    fingerprint.imports.cache_clear()
    assert fingerprint.module_file("prints.top").is_relative_to(elsewhere)
    assert fingerprint.code_version("prints.top") == before


def test_a_module_that_is_not_there():
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        fingerprint.code_version("kvgauge.nowhere")
