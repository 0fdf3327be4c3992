"""Row accounting: rows in, kept, and dropped by reason, for each step of a unit or of the whole run.

A `Funnel` is small and additive: the funnel of a run is the sum over its units, so driver memory does not grow with
the pool. `Funnel.balance` checks that no row was lost between steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from trainer.errors import FailedError


class BooksError(FailedError):
    """Rows were lost or duplicated: a step did not receive exactly the rows that the previous step kept."""


@dataclass
class Line:
    """Rows and time of one step."""

    rows_in: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    figures: list[dict[str, Any]] = field(default_factory=list)
    """Figures of a whole-run filter about its decision (`Filter.figures`): the rows of a small table."""

    @property
    def kept(self) -> int:
        return self.rows_in - sum(self.dropped.values())


@dataclass
class Funnel:
    """Lines of consecutive steps, keyed by step label, in recipe order."""

    lines: dict[str, Line] = field(default_factory=dict)

    @classmethod
    def of(cls, labels: Iterable[str], rows_in: int, drops: Iterable[pa.Table], seconds: dict[str, float]) -> Funnel:
        """Builds the funnel of a unit from its input rows and the drop tables (`schema.DROP`) of its steps."""
        funnel = cls({label: Line(seconds=seconds.get(label, 0.0)) for label in labels})
        for table in drops:
            for group in table.group_by(["step", "reason"]).aggregate([([], "count_all")]).to_pylist():
                reasons = funnel.lines[group["step"]].dropped
                reasons[group["reason"]] = reasons.get(group["reason"], 0) + group["count_all"]
        for line in funnel.lines.values():
            line.rows_in = rows_in
            line.dropped = dict(sorted(line.dropped.items()))
            rows_in = line.kept
        return funnel

    @classmethod
    def from_json(cls, lines: list[dict[str, Any]]) -> Funnel:
        return cls(
            {d["step"]: Line(d["rows_in"], dict(d["dropped"]), d["seconds"], d.get("figures", [])) for d in lines}
        )

    def to_json(self) -> list[dict[str, Any]]:
        """The format of `funnel.json`: a list of `step, rows_in, kept, dropped: {reason: n}, seconds`, and `figures`
        if there are any."""
        return [
            {
                "step": label,
                "rows_in": line.rows_in,
                "kept": line.kept,
                "dropped": line.dropped,
                "seconds": round(line.seconds, 3),
                **({"figures": line.figures} if line.figures else {}),
            }
            for label, line in self.lines.items()
        ]

    def add(self, other: Funnel) -> None:
        """Adds the funnel of other rows or of later steps."""
        for label, theirs in other.lines.items():
            ours = self.lines.setdefault(label, Line())
            ours.rows_in += theirs.rows_in
            ours.seconds += theirs.seconds
            ours.figures = [*ours.figures, *theirs.figures]
            for reason, n in theirs.dropped.items():
                ours.dropped[reason] = ours.dropped.get(reason, 0) + n
            ours.dropped = dict(sorted(ours.dropped.items()))

    @property
    def rows_in(self) -> int:
        return next(iter(self.lines.values())).rows_in if self.lines else 0

    @property
    def kept(self) -> int:
        return list(self.lines.values())[-1].kept if self.lines else 0

    def balance(self) -> None:
        """Raises BooksError unless every step received exactly the rows that the previous step kept."""
        before: tuple[str, Line] | None = None
        for label, line in self.lines.items():
            if before and before[1].kept != line.rows_in:
                raise BooksError(f"{before[0]} kept {before[1].kept:,} rows, but {label} received {line.rows_in:,}")
            before = label, line
