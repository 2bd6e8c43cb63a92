"""Results at a git revision, from git and from DVC's cache, in a repository of its own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvgauge.artifacts import finish
from kvgauge.errors import UserError
from kvgauge.report.comparison import side_by_side
from kvgauge.report.results import read_results

pytest.importorskip("dvc", reason="git revisions are read with DVC")

Row = dict[str, Any]

KSVD = "artifacts/evaluate/ksvd"
PIPELINE = """stages:
  evaluate:
    cmd: "true"
    outs:
      - artifacts/evaluate/never
"""


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", root, *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def repository(
    tmp_path_factory: pytest.TempPathFactory,
    make_samples: Callable[..., list[Row]],
    write_evaluate: Callable[[Path, list[Row]], Path],
) -> Path:
    """Two commits: ``before`` has ksvd in DVC and full in git, in ``after`` ksvd answers everything."""
    from dvc.repo import Repo

    root = tmp_path_factory.mktemp("repository")
    git(root, "init", "-q", "-b", "main")
    Repo.init(str(root)).close()
    samples = make_samples(("ksvd",), (0.5,), (1024,), 4)
    full, ksvd = root / "artifacts" / "evaluate" / "full", root / KSVD

    def write(directory: Path, rows: list[Row]) -> None:
        if directory.exists():
            shutil.rmtree(directory)
        write_evaluate(directory, rows)
        finish(directory, "evaluate", {"prompts": "p"}, cells={row["cell"]: {} for row in rows}, environment={})

    def commit(tag: str) -> None:
        with Repo(str(root)) as repo:
            repo.add(str(ksvd))
        git(root, "add", "--all")
        git(root, "commit", "-qm", tag)
        git(root, "tag", tag)

    write(full, [row for row in samples if row["cell"] == "full"])
    write(ksvd, [row for row in samples if row["method"] == "ksvd"])
    commit("before")
    write(ksvd, [row | {"score": 1.0} for row in samples if row["method"] == "ksvd"])
    (root / "dvc.yaml").write_text(PIPELINE)
    commit("after")
    return root


@pytest.fixture
def here(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(repository)
    return repository


@pytest.fixture
def clone(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone, in whose cache nothing is; its remote has everything."""
    subprocess.run(["git", "clone", "-q", repository, tmp_path / "clone"], check=True)
    root = tmp_path / "clone"
    config = root / ".dvc" / "config.local"
    config.write_text(f"[core]\n    remote = there\n['remote \"there\"']\n    url = {repository / '.dvc' / 'cache'}\n")
    monkeypatch.chdir(root)
    return root


def refused(where: str) -> str:
    with pytest.raises(UserError) as caught:
        read_results(where)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_two_revisions_and_nothing_is_checked_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = git(here, "status", "--porcelain")
    before, after = read_results("before"), read_results("HEAD")
    assert before.directories == ["before:artifacts/evaluate/full", f"before:{KSVD}"]
    assert before.cells == after.cells == 2
    found = {row["cell"]: row for row in side_by_side(before.samples, after.samples, resamples=100).compared}
    assert found["full"]["diff"] == 0.0
    assert found["ksvd@0.5"]["b"] == 1.0 and found["ksvd@0.5"]["diff"] > 0
    assert git(here, "status", "--porcelain") == status
    # What the pipeline of that revision names and has never made is said, not passed over.
    assert capsys.readouterr().err.startswith("left out, not made at HEAD: artifacts/evaluate/never (dvc repro")


def test_a_revision_and_the_working_directory(here: Path) -> None:
    assert read_results("after").samples == read_results("artifacts").samples


def test_a_path_in_a_revision(here: Path) -> None:
    alone = read_results(f"before:{KSVD}")
    assert {row["cell"] for row in alone.samples} == {"ksvd@0.5"}
    assert alone.directories == [f"before:{KSVD}"]
    commit = git(here, "rev-parse", "before")
    assert read_results(f"{commit}:artifacts/evaluate").cells == 2


def test_a_directory_inside_the_repository_may_be_the_working_directory(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here / "artifacts")
    assert read_results("before").cells == 2


def test_what_the_cache_lacks_is_to_be_pulled(clone: Path) -> None:
    message = refused("HEAD")
    assert "HEAD:artifacts" in message and "`dvc pull`" in message and "`dvc repro`" in message
    # What stands in git needs no cache; the remote is not asked.
    assert read_results("HEAD:artifacts/evaluate/full").cells == 1


def test_a_file_that_the_cache_has_lost(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shutil.copytree(here, tmp_path / "copy")
    files = [path for path in (root / ".dvc" / "cache").rglob("*") if path.is_file()]
    [lost] = [path for path in files if path.read_bytes() == (here / KSVD / "samples.jsonl").read_bytes()]
    lost.unlink()
    monkeypatch.chdir(root)
    assert read_results("before").cells == 2
    assert "`dvc pull`" in refused(f"after:{KSVD}")


def test_damage_is_told_by_the_revision_s_own_path(here: Path) -> None:
    path = here / "artifacts" / "evaluate" / "full" / "samples.jsonl"
    git(here, "checkout", "-q", "-b", "damaged")
    try:
        path.write_text("{")
        git(here, "commit", "-qam", "damaged")
    finally:
        git(here, "checkout", "-q", "main")
    assert refused("damaged").startswith("damaged:artifacts/evaluate/full/samples.jsonl is damaged")


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("befor", "befor is neither a directory nor a git revision"),
        ("artifact", "artifact is neither a directory nor a git revision"),
        ("HEAD:nothing", "there are no results at HEAD:nothing"),
        ("HEAD:artifacts/evaluate/never", "there are outputs of DVC, but dvc.lock has none of them"),
        ("HEAD:../elsewhere", "write the path from the root of the repository"),
        ("HEAD:/artifacts", "write the path from the root of the repository"),
    ],
)
def test_mistakes(where: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(where)
    assert capsys.readouterr().err == ""


def test_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "HEAD is neither a directory nor a git revision" in refused("HEAD")


def test_a_repository_without_dvc(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q", "-b", "main", "plain")
    root = tmp_path / "plain"
    shutil.copytree(here / "artifacts" / "evaluate" / "full", root / "artifacts" / "evaluate" / "full")
    git(root, "add", "--all")
    git(root, "commit", "-qm", "results")
    shutil.rmtree(root / "artifacts")
    monkeypatch.chdir(root)
    assert read_results("main").cells == 1


def test_an_experiment_of_dvc_is_a_revision(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shutil.copytree(here, tmp_path / "copy")
    commit = git(root, "rev-parse", "before")
    git(root, "update-ref", f"refs/exps/{commit[:2]}/{commit[2:]}/vivid-name", commit)
    monkeypatch.chdir(root)
    assert read_results("vivid-name").samples == read_results("before").samples
