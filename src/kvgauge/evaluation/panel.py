"""The cells of a run: method × budget, each with everything that its answers depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgauge import configuration
from kvgauge.configuration import digest, plain
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.fitting import learns
from kvgauge.contract.method import Method
from kvgauge.errors import UserError
from kvgauge.evaluation.cell import Cell, moment
from kvgauge.methods.registry import as_method, build_method
from kvgauge.provenance import cell_config, fit_config, load_fit, tokenizer_fingerprint

PANELS = "panels"  # the folder of conf/ with saved panels


@dataclass(frozen=True)
class Setting:
    """A method and its moment of compression, before anything is loaded."""

    method: Method
    compress_at: str


def settings(cfg: DictConfig) -> list[Setting]:
    """The settings that a configuration asks for: those of ``cfg.panel``, or its one method at each of ``cfg.budgets``.

    Args:
        cfg: ``panel`` is null, the name of a file of ``conf/panels/``, or a list of ``{method: name, ...}`` whose other
            keys are fields of the method, or ``compress_at``.

    Raises:
        UserError: an empty panel, an unknown panel, method or field, or a value that a method refuses.
    """
    panel = plain(cfg.panel)
    if panel is None:
        method = as_method(configuration.build(cfg.method, "method"))
        budgets = plain(cfg.budgets) or [method.budget]
        return [Setting(method.sized(budget), moment(cfg.compress_at)) for budget in budgets]
    if isinstance(panel, str):
        panel = configuration.read(PANELS, panel).get("cells")
    if not panel:
        raise UserError("the panel is empty: give at least one cell, e.g. panel='[{method: full}]'")
    if not isinstance(panel, Sequence):
        raise UserError("a panel is a list of cells, e.g. panel='[{method: full},{method: ksvd, budget: 0.5}]'")
    return [_setting(entry, cfg.compress_at) for entry in panel]


def _setting(entry: Any, compress_at: str) -> Setting:
    name = (entry.get("method") or entry.get("_target_")) if isinstance(entry, Mapping) else None
    if not isinstance(name, str):
        raise UserError(f"a cell of a panel needs a method, e.g. {{method: ksvd, budget: 0.5}}, not {entry!r}")
    overrides = {key: value for key, value in entry.items() if key not in ("method", "_target_", "compress_at")}
    return Setting(build_method(name, **overrides), moment(entry.get("compress_at", compress_at)))


def cells(
    cfg: DictConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chosen: Sequence[Setting],
    **more: Any,
) -> list[Cell]:
    """The cells of settings, with the projections of the methods that learn.

    Args:
        cfg: where artifacts are, and what the projections were made from.
        model, tokenizer: loaded.
        chosen: from `settings`.
        more: what else the answers depend on.

    Raises:
        UserError: projections that were not fitted yet, or two cells that are the same.
    """
    loaded: dict[str, Fitted | None] = {}
    found: dict[str, Cell] = {}
    tokens = tokenizer_fingerprint(tokenizer)
    for setting in chosen:
        method, fitted, fingerprint = setting.method, None, None
        if learns(method):
            fingerprint = digest(fit_config(cfg, model, tokenizer, method))
            if fingerprint not in loaded:
                loaded[fingerprint] = load_fit(cfg, model, tokenizer, method)
            fitted = loaded[fingerprint]
        config = cell_config(model, method, fingerprint, setting.compress_at, tokenizer=tokens, **more)
        cell = Cell(method, setting.compress_at, fitted, config)
        if cell.fingerprint in found:
            raise UserError(f"the panel has the cell {cell.label} twice: leave one of them out")
        if any(cell.label == other.label and cell.compress_at == other.compress_at for other in found.values()):
            raise UserError(f"two cells of the panel are called {cell.label}: give one of them another name")
        found[cell.fingerprint] = cell
    return list(found.values())
