"""Put the report together: read, tabulate, draw, write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvgauge.artifacts import replacing, write_json
from kvgauge.errors import UserError
from kvgauge.report import chapters, plots, tables
from kvgauge.report.answers import answer_table, answers
from kvgauge.report.averages import averages_tables
from kvgauge.report.chapters.draft import table_block
from kvgauge.report.collect import Measurements, collect
from kvgauge.report.frontier import frontier_tables
from kvgauge.report.growth import growing, growth_table
from kvgauge.report.needle import needle_table
from kvgauge.report.page import render, slug
from kvgauge.report.task_types import task_type_table

Row = dict[str, Any]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TYPES = (
    "Means of the means of a type's tasks, compressed before the question is read (unseen) and after (seen), with 95% "
    "intervals; diff is the paired difference from the uncompressed cache. Language modelling: KL in nats a token and "
    "perplexity of held-out text that continues a compressed context."
)
AVERAGES = (
    "Means in percent, taken together as the benchmark's papers do. A star: not all tasks that belong to the average "
    "were run."
)


def build_report(
    evaluate_dirs: Iterable[Path | str],
    merge_dirs: Iterable[Path | str],
    latency_dirs: Iterable[Path | str],
    out_dir: Path | str,
    provenance: Mapping[str, Any],
    extra_figures: Sequence[tuple[str, str, Path | str]] = (),
    title: str = "KV-cache compression report",
) -> Path:
    """Write the report: ``index.html``, ``table.csv``, ``table.md``, ``metrics.json`` and the figures as PNG.

    The same input gives the same bytes. Chapters without input are left out; ``table.csv`` and ``table.md`` hold the
    main table, or where nothing was evaluated the fidelity or the latency table. ``task_types.csv`` and
    ``task_types.md`` are written where something was evaluated, ``answers``, ``dominance``, ``frontier``, ``best``,
    ``needle``, ``growth`` and ``averages-<benchmark>`` likewise where there is something to say.

    Args:
        evaluate_dirs: output directories of the evaluate stage.
        merge_dirs: output directories of the merge stage.
        latency_dirs: output directories of the latency stage.
        out_dir: where to write; made if it does not exist.
        provenance: what made the numbers: config, its hash, git revision, library versions; shown on the page.
        extra_figures: title, caption and PNG file of further figures.
        title: of the page.

    Returns:
        The path of ``index.html``.

    Raises:
        UserError: an input is missing, half written or contradictory, or an extra figure is not a PNG file.
    """
    measured = collect(evaluate_dirs, merge_dirs, latency_dirs)
    extras = [(head, caption, _png(path)) for head, caption, path in extra_figures]
    rows = [*measured.cells, *measured.fidelity, *measured.model, *measured.latency]
    palette = plots.Palette(row["method"] for row in rows)
    main = tables.main_table(measured.cells, measured.latency)
    fidelity = tables.fidelity_table(measured.fidelity, measured.model)
    latency = tables.latency_table(measured.latency)
    types = task_type_table(measured.samples, measured.model)
    front = frontier_tables(measured.samples)
    best = answers(measured.samples, measured.cells, measured.latency)
    averages = averages_tables(measured.averages)
    needle = needle_table(measured.samples)
    grown = growing(measured.samples)
    growth = growth_table(grown)

    draft = chapters.Draft()
    if measured.cells:
        if best:
            chapters.best_cells(draft, measured, best)
        chapters.costs(draft, measured, palette)
        chapters.accuracy(draft, measured, main, palette)
        if not front.points.empty:
            chapters.frontier(draft, measured, front, palette)
        draft.chapter("By task type", [table_block(types, "", TYPES)])
        if averages:
            draft.chapter("Averages", [table_block(table, name, AVERAGES) for name, table in averages.items()])
        if not needle.empty:
            chapters.needle(draft, needle)
        if grown:
            chapters.growth(draft, grown, growth, palette)
    if measured.fidelity or measured.model:
        chapters.fidelity(draft, measured, fidelity, palette)
    if measured.latency:
        chapters.latency(draft, measured, latency, palette)
    if extras:
        pictures = [draft.picture(f"extra-{head}", png, head, caption, photo=True) for head, caption, png in extras]
        draft.chapter("Further figures", pictures)

    out = Path(out_dir)
    for name, png in draft.pictures.items():
        _write(out / name, png)
    chief = next((table for table in (main, fidelity, latency) if not table.empty), main)
    beside = {"table": chief} | ({"task_types": types} if measured.cells else {})
    said = {"answers": answer_table(best), "dominance": front.pairs, "frontier": front.points, "best": front.best}
    said |= {"needle": needle, "growth": growth} | {slug(f"averages {name}"): table for name, table in averages.items()}
    beside |= {name: table for name, table in said.items() if not table.empty}
    for name, table in beside.items():
        _write(out / f"{name}.csv", tables.to_csv(table).encode())
        _write(out / f"{name}.md", tables.to_markdown(table).encode())
    write_json(out / "metrics.json", metrics(measured.cells))
    index = out / "index.html"
    _write(index, render(title, _subtitle(measured), draft.sections, provenance).encode())
    return index


def metrics(cells: Sequence[Row]) -> dict[str, float]:
    """Means by ``<cell>.<task>``, flat.

    Where the cells are of several models or several moments of compression, these lead the name; where there are
    several lengths, each length has its mean in ``<cell>.<task>.<length>`` beside the mean over them.
    """
    models = {cell["model"] for cell in cells}
    moments = {cell["compress_at"] for cell in cells}
    several_lengths = any(cell["length"] is None for cell in cells)
    figures: dict[str, float] = {}
    for cell in cells:
        parts = [cell["model"]] if len(models) > 1 else []
        parts += [cell["compress_at"]] if len(moments) > 1 else []
        parts += [cell["cell"], cell["task"]]
        parts += [cell["length"]] if several_lengths and cell["length"] is not None else []
        figures[".".join(str(part) for part in parts)] = cell["mean"]
    return figures


def _subtitle(measured: Measurements) -> str:
    rows = [*measured.cells, *measured.fidelity, *measured.model, *measured.latency]
    models = sorted({str(row["model"]) for row in rows if row.get("model")})
    parts = [", ".join(models)] if models else []
    if measured.samples:
        prompts = len({(row["model"], row["sample_id"]) for row in measured.samples})
        cells = len({row["cell"] for row in measured.cells})
        parts.append(f"{cells} cells on {prompts} prompts of {len(tables.task_names(measured.cells))} tasks")
    return " · ".join(parts)


def _png(path: Path | str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"figure {path} cannot be read: {error.strerror or error}; leave it out or make it") from error
    if not data.startswith(PNG_SIGNATURE):
        raise UserError(f"figure {path} is not a PNG file: save it as PNG")
    return data


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as scratch:
        scratch.write_bytes(data)
