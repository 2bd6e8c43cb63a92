"""Put the report together: read, tabulate, draw, write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from kvgauge.artifacts import replacing, write_json
from kvgauge.errors import UserError
from kvgauge.report import plots, tables
from kvgauge.report.averages import averages_tables
from kvgauge.report.collect import Measurements, collect
from kvgauge.report.frontier import FrontierTables, frontier_tables
from kvgauge.report.page import Block, Section, render, slug
from kvgauge.report.task_types import task_type_table

Row = dict[str, Any]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
READING = (
    "Scores run from 0 to 1. Brackets are 95% intervals: the percentile bootstrap, resampled within tasks; where "
    "a task's scores are all equal, the exact binomial bound. diff is the difference from the uncompressed cache on "
    "the same samples, p the exact two-sided sign test over the samples whose score changed, not corrected for the "
    "number of cells. A true difference below the smallest detectable one would be missed more often than once in "
    "five."
)
TYPES = (
    "Means of the means of a type's tasks, compressed before the question is read (unseen) and after (seen), with 95% "
    "intervals; diff is the paired difference from the uncompressed cache. Language modelling: KL in nats a token and "
    "perplexity of held-out text that continues a compressed context."
)

FRONTIER = (
    "Every cell with its 95% interval; the line joins the cells that no cell of at most the same bytes beats on these "
    "samples. Whether it would on others is what the tables below say."
)
DOMINANCE = (
    "A cell dominates another that takes at least its bytes if its score is better on the same samples: the 95% "
    "interval of the paired difference (bootstrap within tasks) lies above zero. Not corrected for the number of "
    "pairs; all of them are in dominance.csv."
)
BEST = (
    "For each budget the best method as published and the best combination or variant of this project, both chosen by "
    "their score on these samples, and the paired difference (combination minus published) with its 95% interval."
)
AVERAGES = (
    "Means in percent, taken together as the benchmark's papers do. A star: not all tasks that belong to the average "
    "were run."
)


@dataclass
class _Draft:
    """The page's chapters and the pictures beside it, as they come to be."""

    sections: list[Section] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def figure(self, name: str, figure: Figure, title: str, caption: str) -> Block:
        return self.picture(name, plots.to_png(figure), title, caption)

    def picture(self, name: str, png: bytes, title: str, caption: str) -> Block:
        self.pictures[f"{slug(name)}.png"] = png
        return Block(title, caption, png=png)


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
    ``task_types.md`` are written where something was evaluated, ``dominance``, ``frontier``, ``best`` and
    ``averages-<benchmark>`` likewise where there is something to say.

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
    averages = averages_tables(measured.averages)

    draft = _Draft()
    if measured.cells:
        _accuracy(draft, measured, main, palette)
        if not front.points.empty:
            _frontier(draft, measured, front, palette)
        draft.sections.append(Section("By task type", blocks=[_table(types, "", TYPES)]))
        if averages:
            blocks = [_table(table, name, AVERAGES) for name, table in averages.items()]
            draft.sections.append(Section("Averages", blocks=blocks))
    if measured.fidelity or measured.model:
        _fidelity(draft, measured, fidelity, palette)
    if measured.latency:
        _latency(draft, measured, latency, palette)
    if extras:
        blocks = [draft.picture(f"extra-{head}", png, head, caption) for head, caption, png in extras]
        draft.sections.append(Section("Further figures", blocks=blocks))

    out = Path(out_dir)
    for name, png in draft.pictures.items():
        _write(out / name, png)
    chief = next((table for table in (main, fidelity, latency) if not table.empty), main)
    _write(out / "table.csv", tables.to_csv(chief).encode())
    _write(out / "table.md", tables.to_markdown(chief).encode())
    beside = {"task_types": types} if measured.cells else {}
    beside |= {"dominance": front.pairs, "frontier": front.points, "best": front.best}
    beside |= {slug(f"averages {name}"): table for name, table in averages.items()}
    for name, table in beside.items():
        if name == "task_types" or not table.empty:
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


def _table(table: pd.DataFrame, title: str, caption: str) -> Block:
    said = tables.constants(table)
    return Block(title, f"{caption} {f'All rows: {said}.' if said else ''}".strip(), table=tables.readable(table))


def _accuracy(draft: _Draft, measured: Measurements, main: pd.DataFrame, palette: plots.Palette) -> None:
    blocks: list[Block] = []
    for each in _comparisons(measured, palette.baseline):
        mark, cells, overall = each.mark, each.cells, each.overall
        setting = (each.model, each.compress_at)
        samples = [row for row in measured.samples if (row["model"], row["compress_at"]) == setting]
        blocks.append(
            draft.figure(
                f"pareto{mark}",
                plots.pareto(overall, palette),
                f"Accuracy against cached bytes{mark}",
                "Up and left is better. Bars are 95% intervals; the star and the band are the uncompressed "
                "cache; the grey steps join the cells than which none as small (within 4%) is better. Methods "
                "at one budget are set a few points apart.",
            )
        )
        if len(tables.task_names(overall)) > 1:
            blocks.append(
                draft.figure(
                    f"pareto-by-task{mark}",
                    plots.pareto_by_task(overall, palette),
                    f"By task{mark}",
                    "The same, task by task.",
                )
            )
        if any(cell["diff"] is not None for cell in overall):
            blocks.append(
                draft.figure(
                    f"differences{mark}",
                    plots.differences(overall, palette),
                    f"Difference from the uncompressed cache{mark}",
                    "Paired by sample, with 95% intervals. A hollow mark: the interval holds zero.",
                )
            )
        if any(cell["length"] is None for cell in cells):
            blocks.append(
                draft.figure(
                    f"accuracy-by-length{mark}",
                    plots.accuracy_by_length(cells, palette),
                    f"By context length{mark}",
                    "One panel per budget, with 95% intervals.",
                )
            )
        if any(row["method"] != palette.baseline for row in samples):
            blocks.append(
                draft.figure(
                    f"bytes-by-part{mark}",
                    plots.bytes_by_part(samples, palette),
                    f"What the bytes are{mark}",
                    "Means over all samples.",
                )
            )
    blocks.insert(1, _table(main, "Table", READING))
    draft.sections.append(Section("Accuracy and bytes", blocks=blocks))


def _frontier(draft: _Draft, measured: Measurements, front: FrontierTables, palette: plots.Palette) -> None:
    blocks: list[Block] = []
    for each in _comparisons(measured, palette.baseline):
        figure = plots.frontier(each.overall, palette)
        blocks.append(draft.figure(f"frontier{each.mark}", figure, f"The frontier{each.mark}", FRONTIER))
    if not front.best.empty:
        blocks.append(_table(front.best, "The best of each budget", BEST))
    blocks.append(_table(front.points, "Which cells dominate which", DOMINANCE))
    draft.sections.append(Section("Frontier", blocks=blocks))


def _fidelity(draft: _Draft, measured: Measurements, table: pd.DataFrame, palette: plots.Palette) -> None:
    blocks: list[Block] = []
    models = sorted({str(row.get("model", "")) for row in [*measured.fidelity, *measured.model]})
    for model in models:
        mark = _mark(len(models) > 1, model)
        errors = [row for row in measured.fidelity if str(row.get("model", "")) == model]
        predictions = [
            row
            for row in measured.model
            if str(row.get("model", "")) == model and row["method"] != palette.baseline and row["kl"] is not None
        ]
        if predictions:
            blocks.append(
                draft.figure(
                    f"divergence{mark}",
                    plots.divergence(predictions, palette),
                    f"Predictions against cached bytes{mark}",
                    "Down and left is better. Lines join means over sequences, dots are the sequences.",
                )
            )
        if errors:
            blocks.append(
                draft.figure(
                    f"error-by-layer{mark}",
                    plots.error_by_layer(errors, palette),
                    f"Error by layer{mark}",
                    "Relative Frobenius error, mean over sequences.",
                )
            )
        by_rank = plots.error_by_rank(errors, palette) if errors else None
        if by_rank is not None:
            blocks.append(
                draft.figure(
                    f"error-by-rank{mark}",
                    by_rank,
                    f"Error by rank{mark}",
                    "Mean over layers; bands are the range over sequences. Rank of the values for V and VO, "
                    "of the keys otherwise.",
                )
            )
    blocks.append(_table(table, "Table", "Means over layers and sequences; KL in nats per token."))
    draft.sections.append(Section("Fidelity", blocks=blocks))


def _latency(draft: _Draft, measured: Measurements, table: pd.DataFrame, palette: plots.Palette) -> None:
    blocks: list[Block] = []
    settings = sorted({(str(row.get("model", "")), int(row["batch"])) for row in measured.latency})
    for model, batch in settings:
        mark = _mark(len(settings) > 1, model, f"batch {batch}")
        rows = [row for row in measured.latency if (str(row.get("model", "")), int(row["batch"])) == (model, batch)]
        blocks.append(
            draft.figure(
                f"latency{mark}",
                plots.latency_by_context(rows, palette),
                f"Time and memory{mark}",
                "Time to first token includes compression; of time per output token the median is drawn, and "
                "how far its 95th percentile reaches.",
            )
        )
    blocks.append(
        _table(
            table,
            "Table",
            "Uncompressed caches: dynamic is transformers' own, static (full) is preallocated, and one-pass is "
            "preallocated and decodes with the compiled kernel that compressed caches decode with.",
        )
    )
    draft.sections.append(Section("Latency and memory", blocks=blocks))


@dataclass(frozen=True)
class _Comparison:
    """The cells of one model and one moment of compression.

    Attributes:
        mark: what tells its figures from those of others.
        model, compress_at: what its cells have in common.
        cells: all of them.
        overall: the rows over all lengths where there are several, else those of the one length.
    """

    mark: str
    model: str
    compress_at: str
    cells: list[Row]
    overall: list[Row]


def _comparisons(measured: Measurements, baseline: str) -> Iterator[_Comparison]:
    settings = _settings(measured.cells, baseline)
    for model, compress_at in settings:
        cells = _compared(measured.cells, model, compress_at, baseline)
        overall = [cell for cell in cells if cell["length"] is None] or cells
        yield _Comparison(_mark(len(settings) > 1, model, compress_at), model, compress_at, cells, overall)


def _settings(cells: Sequence[Row], baseline: str) -> list[tuple[str, str]]:
    """Model and moment of compression of every comparison; a model with nothing but the baseline has its own."""
    pairs = {(cell["model"], cell["compress_at"]) for cell in cells if cell["cell"] != baseline}
    lonely = {
        (cell["model"], cell["compress_at"]) for cell in cells if cell["model"] not in {pair[0] for pair in pairs}
    }
    return sorted(pairs | lonely)


def _compared(cells: Sequence[Row], model: str, compress_at: str, baseline: str) -> list[Row]:
    """The cells of one comparison; an uncompressed run filed under another moment of compression stands in."""
    of_model = [cell for cell in cells if cell["model"] == model]
    here = [cell for cell in of_model if cell["compress_at"] == compress_at]
    if any(cell["cell"] == baseline for cell in here):
        return here
    elsewhere = [cell for cell in of_model if cell["cell"] == baseline]
    return [cell for cell in elsewhere if cell["compress_at"] == elsewhere[0]["compress_at"]] + here


def _mark(needed: bool, *names: str) -> str:
    said = ", ".join(name for name in names if name)
    return f" ({said})" if needed and said else ""


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
