"""What DVC's stages read and watch: `params.yaml`, and in `dvc.yaml` the sources that each stage reaches.

    python -m kvgauge.suite

composes `params.yaml` from `conf/suite.yaml`, with the function that ``dvc exp run`` itself composes with, so that both
agree to the byte; and it writes the code among the ``deps`` of every stage, found by `kvgauge.fingerprint` from the
stage's module and from the classes that its parameters name, with the configurations of a panel's methods. Everything
else in `dvc.yaml` is written by hand.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from dvc.utils.hydra import compose_and_dump
from ruamel.yaml import YAML

from kvgauge import configuration, fingerprint
from kvgauge.artifacts import replacing
from kvgauge.configuration import CONF_DIR
from kvgauge.evaluation.panel import PANELS

PARAMS, PIPELINE = "params.yaml", "dvc.yaml"
CODE = ("pipelines/", "src/", "conf/")
PACKAGE = "src/kvgauge/"
# What a folder of these holds concerns a stage that reaches half of it; of the others, every file stands for itself, so
# that a method's stages do not run again for another family.
WHOLE = [
    "architecture",
    "attend",
    "benchmarks/longbench",
    "benchmarks/ruler",
    "calibration",
    "contract",
    "corpora",
    "evaluation",
    "kernels",
    "layers",
    "models",
    "prompts",
    "store",
]


def write_params(path: Path) -> None:
    """Compose ``conf/suite.yaml`` into `path`."""
    with replacing(path) as scratch:
        target = scratch.with_suffix(".yaml")
        compose_and_dump(str(target), str(CONF_DIR), None, "suite", str(CONF_DIR), [])
        text = target.read_bytes()
        target.unlink()
        scratch.write_bytes(text)


def write_pipeline(path: Path, params: Path) -> None:
    """Bring the code among the ``deps`` of every stage of the DVC file `path` up to date.

    Args:
        path: ``dvc.yaml``, beside the folders `CODE`.
        params: whose nodes name the classes that stages build.
    """
    with replacing(path) as scratch:
        scratch.write_text(pipeline(path, yaml.safe_load(params.read_text(encoding="utf-8"))), encoding="utf-8")


def pipeline(path: Path, params: Mapping[str, Any]) -> str:
    """The text of the DVC file `path` with the code that its stages reach."""
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 120
    editor.indent(mapping=2, sequence=4, offset=2)
    document = editor.load(path.read_text(encoding="utf-8"))
    for stage in document["stages"].values():
        others = [entry for entry in stage["deps"] if not entry.startswith(CODE)]
        stage["deps"][:] = [*code_of(stage, params, path.parent), *others]
    text = io.StringIO()
    editor.dump(document, text)
    return text.getvalue()


def code_of(stage: Mapping[str, Any], params: Mapping[str, Any], root: Path) -> list[str]:
    """Files and folders of `root` that a stage reaches: a folder where it reaches all of it, or enough (`WHOLE`)."""
    found = re.search(r"python -m (pipelines\.\w+)", stage["cmd"])
    assert found is not None, f"no stage of pipelines/ in {stage['cmd']!r}"
    nodes = [params[key] for key in stage["params"] if key != "panel"]
    names: set[tuple[str, str]] = set()  # (group, name) of configurations
    if "panel" in stage["params"]:
        names |= set(_panel(params["panel"]))
        nodes += [configuration.read(group, name) for group, name in names]
    targets = (target for node in nodes for target in _targets(node))
    modules = fingerprint.reached(found.group(1), *(target.rpartition(".")[0] for target in targets))
    files = {path.relative_to(root) for name in modules for path in fingerprint.sources(name)}
    files |= {configuration.files(group)[name].relative_to(root) for group, name in names}
    return [path.as_posix() for path in sorted(_collapsed(files, root))]


def _panel(panel: str) -> Iterator[tuple[str, str]]:
    """The configurations that a saved panel is made of, itself, its methods and their members, as (group, name)."""
    yield PANELS, panel
    pending = list(configuration.read(PANELS, panel)["cells"])
    while pending:
        entry = pending.pop()
        name = entry["method"] if isinstance(entry, Mapping) else entry
        yield next((group, name) for group in ("method", "quantizer") if name in configuration.names(group))
        if isinstance(entry, Mapping):
            pending += entry.get("compose", [])


def _targets(node: Any) -> Iterator[str]:
    """Every ``_target_`` in a node."""
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)


def _collapsed(files: Iterable[Path], root: Path) -> set[Path]:
    """Folders in the place of their files, where enough of them are there; not for the outermost folders."""
    known = set(files)
    while True:
        whole = {folder for folder in {path.parent for path in known} if _enough(folder, known, root)}
        if not whole:
            return known
        known = {path for path in known if not whole & set(path.parents)} | whole


def _enough(folder: Path, known: set[Path], root: Path) -> bool:
    content = {
        path.relative_to(root)
        for path in (root / folder).iterdir()
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
    }
    share = 0.5 if folder.as_posix().removeprefix(PACKAGE) in WHOLE else 1.0
    return folder.parts[0] == "src" and len(folder.parts) > 2 and len(content & known) >= share * len(content)


def main() -> None:
    """Write both files, into the directory that is given or the current one."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    write_params(directory / PARAMS)
    write_pipeline((directory / PIPELINE).resolve(), directory / PARAMS)


if __name__ == "__main__":
    main()
