"""The house: imports run down only, families know nothing of each other, and the root is for users alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvgauge.fingerprint import imports, module_file, reached

# From the top floor down; a module may import what stands behind it here, and its own package.
FLOORS = [
    "__main__",
    "testing",
    "simulation",
    "lm_eval",
    "suite",
    "cli",
    "compare",
    "report",
    "measure",
    "evaluation",
    "tracking",
    "provenance",
    "methods",
    "benchmarks",
    "contract",
    "calibration",
    "prompts",
    "models",
    "corpora",
    "layers",
    "attend",
    "store",
    "kernels",
    "architecture",
    "stage",
    "run_config",
    "artifacts",
    "fingerprint",
    "run_config",
    "configuration",
    "field_types",
    "user_cache",
    "errors",
]

SOURCE = Path(__file__).parents[1] / "src"
MODULES = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(SOURCE.rglob("*.py"))
]


def floor(module: str) -> str:
    return module.split(".")[1]


def family(module: str) -> str | None:
    """The folder of a family, None for what all of them share."""
    parts = module.split(".")
    return parts[2] if len(parts) > 3 and parts[1] == "methods" else None


def test_every_module_stands_on_a_floor():
    assert {floor(module) for module in MODULES if module != "kvgauge"} <= set(FLOORS)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "kvgauge"])
def test_imports_run_down(module):
    for imported in imports(module):
        if not imported.startswith("kvgauge."):
            continue
        own, other = FLOORS.index(floor(module)), FLOORS.index(floor(imported))
        assert other >= own, f"{module} imports {imported}, which stands above it"
        assert family(module) in (None, family(imported)) or family(imported) is None, f"{module} imports {imported}"


@pytest.mark.parametrize("module", ["kvgauge.evaluation.run", "kvgauge.report.build", "pipelines.prepare"])
def test_no_stage_knows_a_benchmark(module):
    modules = reached(module)
    assert len(modules) > 10 and not [name for name in modules if name.startswith("kvgauge.benchmarks")]


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ("kvgauge", "kvgauge.testing")])
def test_nothing_inside_takes_the_root(module):
    path = module_file(module)
    assert path is not None
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "import kvgauge" not in [line.strip() for line in lines]
