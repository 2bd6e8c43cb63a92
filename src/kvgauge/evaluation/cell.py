"""A cell of a run: one method at one setting, with everything that its answers depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvgauge.configuration import digest
from kvgauge.contract.fitted import Fitted
from kvgauge.contract.method import Method, budget_in_force
from kvgauge.contract.while_decoding import cell_label
from kvgauge.errors import unknown

COMPRESS_AT = ("context", "prompt")


def moment(compress_at: str) -> str:
    """`compress_at`, if it is a moment of compression: before the question is read, or after.

    Raises:
        UserError: another word.
    """
    if compress_at not in COMPRESS_AT:
        raise unknown("compress_at", str(compress_at), COMPRESS_AT)
    return compress_at


@dataclass(frozen=True)
class Cell:
    """One method at one setting.

    Attributes:
        method: with its budget.
        compress_at: ``context`` or ``prompt``.
        fitted: what the method learned.
        config: everything but the sample that its answers depend on.
    """

    method: Method
    compress_at: str
    fitted: Fitted | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return cell_label(self.method)

    @property
    def fingerprint(self) -> str:
        return digest(self.config)

    @property
    def budget(self) -> float | None:
        """The budget in force; None where explicit ranks or entry counts override it, as the label then tells."""
        return budget_in_force(self.method)
